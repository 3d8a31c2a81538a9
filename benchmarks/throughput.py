"""TCP, UDP and round trips through a link: ours by UDP and by the gRPC tunnel, beside other WireGuard programs.

With the compiled core (`make native`) "siderolink, UDP" and the tunnel use it; "pure Python" never does.

    sudo python benchmarks/throughput.py [--seconds 10] [--rounds 3] [--only tcp] [--carriers udp,newest] [--save FOLDER]

Every carrier links two network namespaces joined by a veth pair, with an inner MTU of 1280 and IPv6 inside. TCP uses Linux's
default congestion control, cubic. All links are up at the same time, and each measure is taken of each of them in turn, round
by round; the table shows medians. Everything shares the machine's cores, the loads' own programs too: read the figures as
ratios to their neighbours.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.support.carriers import (
    COMMAND,
    Carried,
    Carrier,
    bare_wire,
    existing,
    go_peers,
    newest_wireguard_go,
    siderolink,
    wireguard,
)
from benchmarks.support.report import Measure, Report
from tests.support.netns import Namespace
from tests.support.wireguard_go import WIREGUARD_GO

NAMES = {
    "udp": "siderolink, UDP",
    "pure": "siderolink, pure Python",
    "newest": "wireguard-go, newest",
    "debian": "wireguard-go, Debian's",
    "tunnel": "siderolink, gRPC tunnel",
    "existing": "grpc-go and wireguard-go, gRPC tunnel",
    "wire": "veth alone",
}
REPEATED = ("tcp", "udp", "ping")
Values = Iterable[tuple[str, float]]


WAYS = ("up", "down")
MEASURES = [
    *(Measure(f"TCP {flows} {way}", "Mbit/s") for flows in ("1 flow", "8 flows") for way in WAYS),
    Measure("TCP retransmits", "of 10,000 segments", more_is_better=False, digits=2),
    *(Measure(f"UDP {size} B {way}", "received/s") for size in (1200, 64) for way in WAYS),
    *(
        Measure(f"ping {state} {which}", "ms", more_is_better=False, digits=2)
        for state in ("idle", "under TCP up", "under TCP down")
        for which in ("median", "p99")
    ),
    Measure("memory of one end", "MB", more_is_better=False),
    Measure("processor time, TCP 1 flow", "ms for 10 MB", more_is_better=False, digits=1),
]


def iperf(carried: Carried, seconds: float, *more: str) -> dict[str, Any]:
    """The end of iperf3's own report, of a flow from the machine (to it, with ``--reverse``)."""
    command = ["iperf3", "--client", carried.address, "--time", str(seconds), "--json", *more]
    for _ in range(20):
        try:
            found = json.loads(carried.machine.run(command, check=False, timeout=seconds + 30))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command)} did not end\n{_state(carried)}") from error
        if not any(sign in found.get("error", "") for sign in ("busy", "reset by peer")):
            break
        time.sleep(0.5)  # the server is still closing the previous flow
    if "error" in found:
        raise RuntimeError(f"iperf3: {found['error']}")
    end: dict[str, Any] = found["end"]
    return end


def _state(carried: Carried) -> str:
    """Whether the link still carries packets, and the state of both ends' TCP."""
    pings = carried.machine.run(["ping", "-c", "3", "-i", "0.2", carried.address], check=False)
    ends = [f"{end.name}:\n{end.run(['ss', '-tinmo'], check=False)}" for end in (carried.machine, carried.server)]
    return "\n".join((pings, *ends))


def tcp(carried: Carried, seconds: float) -> Values:
    retransmits, segments = 0.0, 0.0
    for flows, streams in (("1 flow", "1"), ("8 flows", "8")):
        for way, more in (("up", ()), ("down", ("--reverse",))):
            before = carried.cpu()
            end = iperf(carried, seconds, "--omit", "1", "--parallel", streams, *more)
            received = end["sum_received"]
            yield f"TCP {flows} {way}", received["bits_per_second"] / 1e6
            retransmits += end["sum_sent"].get("retransmits") or 0
            segments += end["sum_sent"]["bytes"] / 1208
            if streams == "1" and way == "up":
                # the omitted first second costs work, too
                share = seconds / (seconds + 1)
                yield "processor time, TCP 1 flow", (carried.cpu() - before) * share * 1e3 / (received["bytes"] / 1e7)
    yield "TCP retransmits", retransmits / segments * 10_000
    yield "memory of one end", carried.memory() / 1e6


def udp(carried: Carried, seconds: float) -> Values:
    for size in (1200, 64):
        for way, more in (("up", ()), ("down", ("--reverse",))):
            end = iperf(carried, seconds, "--udp", "--bandwidth", "0", "--length", str(size), *more)["sum"]
            yield f"UDP {size} B {way}", (end["packets"] - end["lost_packets"]) / end["seconds"]


def ping(carried: Carried, seconds: float) -> Values:
    yield from _ping(carried, seconds, "idle")
    for way, more in (("up", ()), ("down", ("--reverse",))):
        command = ["iperf3", "--client", carried.address, "--time", str(seconds + 4), *more]
        load = carried.machine.popen(command, stdout=subprocess.DEVNULL)
        time.sleep(1.5)
        yield from _ping(carried, seconds, f"under TCP {way}")
        if load.poll() is not None:
            raise RuntimeError("the load ended before the pings")
        load.wait()


def _ping(carried: Carried, seconds: float, state: str) -> Values:
    command = ["ping", "-i0.01", f"-w{round(seconds)}", carried.address]
    trips = sorted(map(float, re.findall(r"time=([\d.]+)", carried.machine.run(command, check=False, timeout=seconds + 20))))
    yield f"ping {state} median", trips[len(trips) // 2]
    yield f"ping {state} p99", trips[len(trips) * 99 // 100]


def listen(namespace: Namespace) -> None:
    server = namespace.popen(["iperf3", "--server", "--forceflush"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    while "listening" not in server.stdout.readline():
        if server.poll() is not None:
            raise RuntimeError("iperf3 did not start")
    # it blocks if nobody reads its output
    threading.Thread(target=server.stdout.read, daemon=True).start()


def carriers(wanted: Sequence[str], newest: str | None) -> dict[str, Carrier]:
    found: dict[str, Carrier] = {}
    for key in wanted:
        made = carrier(key, newest)
        if made is None:
            print(f"without Go there is no {NAMES[key]} to compare with", file=sys.stderr)
        else:
            found[key] = made
    return found


def carrier(key: str, newest: str | None) -> Carrier | None:
    """The carrier of that name; None if it has to be built and cannot be."""
    if key == "newest":
        command = newest_wireguard_go(newest)
        return None if command is None else wireguard(command)
    if key == "existing":
        program = go_peers()
        return None if program is None else existing(program)
    return {
        "udp": wireguard((*COMMAND, "wireguard")),
        "pure": wireguard(("env", "SIDEROLINK_NATIVE=0", *COMMAND, "wireguard")),
        "debian": wireguard(WIREGUARD_GO),
        "tunnel": siderolink(tunnel=True),
        "wire": bare_wire,
    }[key]


def measure(made: dict[str, Carrier], what: Sequence[str], seconds: float, rounds: int) -> tuple[Report, int]:
    """The report and the number of failed measures. A failure is printed at once, and the others continue."""
    failed = 0
    report = Report(MEASURES, [NAMES[key] for key in made])
    kinds: dict[str, Callable[[Carried, float], Values]] = {"tcp": tcp, "udp": udp, "ping": ping}
    with ExitStack() as stack:
        links = {NAMES[key]: stack.enter_context(carrier()) for key, carrier in made.items()}
        for carried in links.values():
            listen(carried.server)
        for number in range(rounds):
            for kind in what:
                for name, carried in links.items():
                    print(f"round {number + 1} of {rounds}: {kind}: {name}", file=sys.stderr)
                    try:
                        for label, value in kinds[kind](carried, seconds):
                            report.add(label, name, value)
                    except RuntimeError as error:
                        failed += 1
                        print(f"FAILED: {kind}: {name}: {error}", file=sys.stderr)
    return report, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(REPEATED), help="which of tcp, udp and ping")
    parser.add_argument("--carriers", default=",".join(NAMES), help=f"which of {', '.join(NAMES)}")
    parser.add_argument("--wireguard-go", metavar="PATH", help="the newest wireguard-go (default: it is built)")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where throughput.json and throughput.svg go")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    made = carriers(options.carriers.split(","), options.wireguard_go)
    report, failed = measure(made, options.only.split(","), options.seconds, options.rounds)
    against = NAMES["newest"] if "newest" in made else report.carriers[-1]
    given = ("FOLDER" if one == str(options.save) else one for one in sys.argv[1:])
    text = report.as_json(shlex.join(["benchmarks/throughput.py", *given]))
    print(text if options.json else report.table(against))
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "throughput.json").write_text(text + "\n")
        report.plot(options.save / "throughput.svg", against)
    if failed:
        sys.exit(f"{failed} measures failed, as told above; the medians are of the others")


if __name__ == "__main__":
    main()
