"""How a server fares with ten thousand machines: joins, memory, handshakes, a restart, idleness. Each figure beside its reach.

    sudo python benchmarks/scale.py [--machines 10000] [--only joins,joined,udp,tunnel,nat,flat] [--json FILE]

Server and machines are processes in two namespaces: real connections, and real datagrams from as many addresses as machines.
Joins need a compiled load generator: `--joinload PROGRAM`, called with -dest, -n and -c, that prints `rate=N/s`.
"""

import argparse
import asyncio
import gc
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.support.report import machine
from benchmarks.support.scale_net import (
    ONE_SOURCE,
    ServerProcess,
    SwarmProcess,
    idle_share,
    scale_net,
    state_file,
)
from tests.support.crowd import event_costs, open_crowd
from tests.support.topology import SERVER_V4, Net

_SETTLE_SECONDS = 8.0
"""Long enough for the pending writes of a connection to be done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    value: float
    unit: str
    against: str = ""
    """The other side's result in the same run."""
    reach: float | None = None
    at_most: bool = False
    """Whether the reach is an upper bound."""

    @property
    def is_reached(self) -> bool | None:
        if self.reach is None:
            return None
        return self.value <= self.reach if self.at_most else self.value >= self.reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    machines: int
    rounds: int
    joins: int
    joinload: str | None
    idle_seconds: float


def measure_joins(options: Options) -> Iterator[Figure]:
    """New connections, 32 at a time, to a bare handler and to Provision in turn: the rate and the server's processor time."""
    if options.joinload is None:
        print("joins: no load generator; see --joinload", file=sys.stderr)
        return
    kinds = ("bare grpclib, constant answer", "ours, in memory", "ours, state file")
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    costs: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind in kinds:
            with scale_net() as net, state_file() as state:
                server = ServerProcess(net, bare=kind == kinds[0], state=state if kind == kinds[2] else None)
                _load(net, options, options.joins // 5)
                before = server.cpu
                rates[kind].append(_load(net, options, options.joins))
                costs[kind].append((server.cpu - before) / options.joins * 1000)
                server.stop()
    bare_rate, bare_cost = median(rates[kinds[0]]), median(costs[kinds[0]])
    against = f"{kinds[0]}: {bare_rate:.0f}/s, {bare_cost:.2f} ms of processor each"
    for kind in kinds[1:]:
        rate, cost = median(rates[kind]), median(costs[kind])
        durable = kind == kinds[2]
        yield Figure(name=f"joins, {kind}", value=round(rate), unit="/s", against=against)
        yield Figure(
            name=f"joins, {kind}, by rate",
            value=rate / bare_rate,
            unit="× bare",
            against=against,
            reach=0.8 if durable else None,
        )
        yield Figure(
            name=f"joins, {kind}, by processor time",
            value=bare_cost / cost,
            unit="× bare",
            against=f"{cost:.2f} ms; {against}",
            reach=0.8 if durable else None,
        )


def _load(net: Net, options: Options, count: int) -> float:
    assert options.joinload is not None
    command = [options.joinload, "-dest", f"{SERVER_V4}:4000", "-n", str(count), "-c", "32"]
    said = net.machine.run(command, timeout=120)
    found = re.search(r"failed=0 rate=(\d+)/s", said)
    assert found is not None, said
    return float(found[1])


def measure_udp(options: Options) -> Iterator[Figure]:
    """Ten thousand machines by UDP: memory, handshakes, idleness, and their return after a restart."""
    count = options.machines
    with scale_net() as net, state_file() as state:
        server = ServerProcess(net, state=state)
        empty = server.settle()
        swarm = SwarmProcess(net, count)
        joined, connected = swarm.phase(), swarm.phase()
        yield Figure(name="joins by simulated machines on the same cores", value=joined["rate"], unit="/s")
        yield Figure(name="first connection of all", value=connected["seconds"], unit="s")
        time.sleep(_SETTLE_SECONDS)  # the history of the joins is written first
        before = server.cpu
        swarm.reconnect()
        yield Figure(
            name="handshakes answered (cookie round, UDP and events included)",
            value=count / (server.cpu - before),
            unit="per second of processor",
            reach=3000,
        )
        server.settle()
        swarm.reconnect()
        yield Figure(
            name="memory of a machine connected by UDP",
            value=(server.settle() - empty) / count,
            unit="KB",
            reach=10,
            at_most=True,
        )
        time.sleep(_SETTLE_SECONDS)
        yield Figure(
            name="idle processor, all connected by UDP",
            value=idle_share(server, options.idle_seconds) * 100,
            unit="% of a core",
            reach=15,
            at_most=True,
        )
        server.stop()
        server = ServerProcess(net, state=state)
        loaded = server.settle()
        yield Figure(
            name="memory of a machine that is known and not connected",
            value=(loaded - empty) / count,
            unit="KB",
            against="the reference server: 82 KB",
            reach=3,
            at_most=True,
        )
        back = swarm.reconnect()
        yield Figure(
            name="all are back after a restart",
            value=back["seconds"],
            unit="s",
            against=f"half of them in {back['p50']:.1f} s; after a restart of the reference server a machine is back in 291 s",
            reach=15,
            at_most=True,
        )
        swarm.stop()
        server.stop()


def measure_joined(options: Options) -> Iterator[Figure]:
    """Memory of machines that joined, as their calls leave it."""
    if options.joinload is None:
        print("memory of joined machines: no load generator; see --joinload", file=sys.stderr)
        return
    with scale_net() as net:
        server = ServerProcess(net)
        _load(net, options, 500)
        before = server.settle()
        _load(net, options, options.machines)
        yield Figure(
            name="memory of a machine that joined and is not connected",
            value=(server.settle() - before) / options.machines,
            unit="KB",
            against="the reference server: 82 KB",
            reach=3,
            at_most=True,
        )
        server.stop()


def measure_nat(options: Options) -> Iterator[Figure]:
    """A tenth of the machines behind one address."""
    count = max(1, options.machines // 10)
    with scale_net() as net, state_file() as state:
        server = ServerProcess(net, state=state)
        swarm = SwarmProcess(net, count, sources=ONE_SOURCE)
        swarm.phase()
        swarm.phase()
        server.stop()
        server = ServerProcess(net, state=state)
        back = swarm.reconnect()
        yield Figure(
            name=f"{count} behind one address are back after a restart", value=back["seconds"], unit="s", reach=15, at_most=True
        )
        swarm.stop()
        server.stop()


def measure_tunnel(options: Options) -> Iterator[Figure]:
    count = min(options.machines, 9_000)  # each takes a descriptor at both ends, and limits of 20,000 are common
    with scale_net() as net:
        server = ServerProcess(net)
        empty = server.settle()
        swarm = SwarmProcess(net, count, tunnel=True)
        swarm.phase()
        swarm.phase()
        yield Figure(
            name=f"memory of a machine connected by tunnel ({count})",
            value=(server.settle() - empty) / count,
            unit="KB",
            reach=60,
            at_most=True,
        )
        time.sleep(_SETTLE_SECONDS)
        yield Figure(
            name="idle processor, all connected by tunnel",
            value=idle_share(server, options.idle_seconds) * 100,
            unit="% of a core",
            reach=15,
            at_most=True,
        )
        swarm.stop()
        server.stop()


def measure_flat(options: Options) -> Iterator[Figure]:
    costs: dict[str, dict[str, list[float]]] = {}

    async def run() -> None:
        async with open_crowd(10) as few, open_crowd(options.machines) as many:
            gc.collect()
            gc.freeze()
            for _ in range(options.rounds * 2):
                for name, crowd in (("few", few), ("many", many)):
                    for kind, seconds in (await event_costs(crowd, 100)).items():
                        costs.setdefault(kind, {}).setdefault(name, []).append(seconds)

    asyncio.run(run())
    gc.unfreeze()
    for kind, by_crowd in costs.items():
        few, many = median(by_crowd["few"]), median(by_crowd["many"])
        yield Figure(
            name=f"one {kind}, among {options.machines} machines",
            value=many / few,
            unit="× among ten",
            against=f"{many * 1e6:.1f} µs, {few * 1e6:.1f} µs",
            reach=None if "," in kind else 1.3,
            at_most=True,
        )


PARTS = {
    "joins": measure_joins,
    "joined": measure_joined,
    "udp": measure_udp,
    "nat": measure_nat,
    "tunnel": measure_tunnel,
    "flat": measure_flat,
}


def table(figures: list[Figure]) -> str:
    """Markdown."""
    lines = ["| | measured | reach | reached | beside it |", "| --- | ---: | ---: | --- | --- |"]
    for figure in figures:
        reach = "" if figure.reach is None else f"{'≤' if figure.at_most else '≥'} {figure.reach:g}"
        reached = {None: "", True: "yes", False: "**no**"}[figure.is_reached]
        lines.append(f"| {figure.name} | {figure.value:,.4g} {figure.unit} | {reach} | {reached} | {figure.against} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--joins", type=int, default=3_000)
    parser.add_argument("--joinload", default=shutil.which("joinload"))
    parser.add_argument("--idle-seconds", type=float, default=50.0)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    only, file = given.pop("only").split(","), given.pop("json")
    options = Options(**given)
    figures: list[Figure] = []
    for name in only:
        for figure in PARTS[name](options):
            figures.append(figure)
            print(f"{figure.name}: {figure.value:,.4g} {figure.unit}  {figure.against}", file=sys.stderr, flush=True)
    print(table(figures))
    if file is not None:
        rows = [asdict(figure) | {"is_reached": figure.is_reached} for figure in figures]
        file.write_text(json.dumps({"command": sys.argv, "machine": machine(), "figures": rows}, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
