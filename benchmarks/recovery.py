"""How soon links are back after what may happen to them: server and machines in namespaces, one table.

    python benchmarks/recovery.py [--machines 1000] [--talos 60] [--peers 20] [--down 60] [--only WORD]

The server is `siderolink serve` with a state file, killed with SIGKILL. Machines send a packet every second (those that are not
ours, every half) and are back when one is answered. Needs root, nft, wireguard-go and wg.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import anyio
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal

from siderolink import Link, LinkEvent, connect
from siderolink.client import Connected, ConnectionState, StateChanged
from siderolink.common.join_url import JoinURL
from siderolink.common.tasks import background_tasks
from tests.support.go_machines import GoMachine, go_machines
from tests.support.netns import Namespace, stop
from tests.support.packet_machine import Answers, PacketMachine
from tests.support.serving import API, SERVER, TOKEN, Served, served
from tests.support.talos_machine import TalosMachine
from tests.support.topology import Net, direct

URL = f"grpc://{API}?jointoken={TOKEN}"
TUNNEL_URL = f"{URL}&grpc_tunnel=true"
RULES = "table inet fault {{\n chain input {{ type filter hook input priority 0; {0}; }}\n}}\n"
SETTLE = 12.0
"""Seconds that a link is up before a fault; a kept connection counts only after five."""


class Machine(Protocol):
    """The kind of machine in a swarm."""

    answers: Answers

    def ping(self) -> None: ...

    async def run(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table."""

    event: str
    machines: int
    seconds: tuple[float, ...]
    """The reconnection times."""
    reach: float

    def row(self) -> str:
        back = len(self.seconds)
        worst = max(self.seconds, default=float("inf"))
        median = statistics.median(self.seconds) if self.seconds else float("inf")
        met = "yes" if back == self.machines and worst <= self.reach else "NO"
        return f"| {self.event} | {back} of {self.machines} | {median:.2f} s | {worst:.2f} s | {self.reach:g} s | {met} |"


class Swarm:
    """Machines on one loop that run until the body ends."""

    def __init__(self, machines: Sequence[Machine], is_silent: Callable[[Machine], bool], *, every: float = 1.0) -> None:
        """Each sends a packet every `every` seconds, except silent ones."""
        self.machines = machines
        self._is_silent = is_silent
        self._pause = every / 50

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        async with background_tasks() as tasks:
            for machine in self.machines:
                tasks.start_soon(machine.run)
                await anyio.sleep(0.002)
            task_status.started()
            step, due = 0, time.monotonic()
            while True:
                for machine in self.machines[step::50]:
                    if machine.answers.last_at == float("-inf") or not self._is_silent(machine):
                        machine.ping()
                # On a busy host the packets are not much rarer, and none are made up for.
                step, due = (step + 1) % 50, max(due + self._pause, time.monotonic())
                await anyio.sleep(max(0.0, due - time.monotonic()))

    def back(self) -> int:
        return sum(machine.answers.first_at is not None for machine in self.machines)


@contextmanager
def running(namespace: Namespace, swarm: Swarm) -> Iterator[None]:
    with namespace.portal() as portal:
        future, _ = portal.start_task(swarm.run)
        try:
            yield
        finally:
            future.cancel()


def watch_all(swarm: Swarm) -> None:
    for machine in swarm.machines:
        machine.answers.watch()


def wait_back(swarm: Swarm, within: float) -> None:
    deadline = time.monotonic() + within
    while swarm.back() < len(swarm.machines) and time.monotonic() < deadline:
        time.sleep(0.1)


def figure(event: str, machines: Sequence[Machine], since: float, reach: float) -> Figure:
    seconds = tuple(max(0.0, machine.answers.first_at - since) for machine in machines if machine.answers.first_at is not None)
    return Figure(event, len(machines), seconds, reach)


def restart(server: Served, swarm: Swarm, within: float) -> float:
    """Kill and restart the server, and wait for the machines; returns when it listened."""
    server.kill()
    watch_all(swarm)
    server.start()
    listened_at = time.monotonic()
    wait_back(swarm, within)
    return listened_at


def restart_of_ours(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    urls = [JoinURL.parse(URL), JoinURL.parse(TUNNEL_URL)]
    machines = [PacketMachine(urls[number % 2]) for number in range(options.machines)]
    swarm = Swarm(machines, lambda machine: False)
    with served(net.server, folder, "--connections-per-address", "10000") as server, running(net.machine, swarm):
        watch_all(swarm)
        wait_back(swarm, 120)
        time.sleep(SETTLE)
        since = restart(server, swarm, 60)
    return [
        figure("server killed: ours by UDP", machines[::2], since, 5),
        figure("server killed: ours by the tunnel", machines[1::2], since, 5),
    ]


def restart_of_others(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    udp, tunnel = JoinURL.parse(URL), JoinURL.parse(TUNNEL_URL)
    third = max(1, options.talos // 3)
    groups: list[tuple[str, list[Any], float]] = [
        ("server killed: Talos by UDP", [TalosMachine(udp, sends=True) for _ in range(third)], 5),
        ("server killed: Talos by the tunnel, sending", [TalosMachine(tunnel, sends=True) for _ in range(third)], 12),
        ("server killed: Talos by the tunnel, idle", [TalosMachine(tunnel, sends=False) for _ in range(third)], 60),
    ]
    with served(net.server, folder, "--connections-per-address", "10000") as server, ExitStack() as stack:
        peers: Sequence[GoMachine] = stack.enter_context(go_machines(net.machine, API, TOKEN, options.peers))
        groups.append(("server killed: wireguard-go by UDP", list(peers), 5))
        machines = [machine for _, group, _ in groups for machine in group]
        swarm = Swarm(machines, lambda machine: isinstance(machine, TalosMachine) and not machine.sends, every=0.5)
        stack.enter_context(running(net.machine, swarm))
        watch_all(swarm)
        wait_back(swarm, 60)
        time.sleep(SETTLE)
        server.kill()
        watch_all(swarm)
        server.start()
        since = time.monotonic()
        ping_from_server(net, groups[2][1], stack)
        wait_back(swarm, 75)
    return [figure(event, group, since, reach) for event, group, reach in groups]


def ping_from_server(net: Net, machines: Sequence[TalosMachine], stack: ExitStack) -> None:
    """Idle machines send nothing by themselves, so the server pings them every second."""
    for machine in machines:
        assert machine.provisioned is not None
        address = str(machine.provisioned.address.ip)
        stack.callback(stop, net.server.popen(["ping", "-q", "-i1", address], stdout=subprocess.DEVNULL))


def rotated_key(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    """The server gets another key while it runs. Counts from the moment at which it listens again."""
    urls = [JoinURL.parse(URL), JoinURL.parse(TUNNEL_URL)]
    machines = [PacketMachine(urls[number % 2]) for number in range(max(2, options.machines // 5))]
    swarm = Swarm(machines, lambda machine: False)
    with served(net.server, folder, "--connections-per-address", "10000") as server, running(net.machine, swarm):
        watch_all(swarm)
        wait_back(swarm, 120)
        time.sleep(SETTLE)
        server.command(["state", "rotate-key"])
        since = time.monotonic()
        watch_all(swarm)
        wait_back(swarm, 60)
    return [
        figure("server's key rotated: by UDP", machines[::2], since, 10),
        figure("server's key rotated: by the tunnel", machines[1::2], since, 10),
    ]


# One link and its faults


class Joined:
    """A link with an interface, and its events."""

    def __init__(self, namespace: Namespace, portal: BlockingPortal, link: Link, events: list[LinkEvent]) -> None:
        self.namespace, self.portal, self.link, self.events = namespace, portal, link, events

    def seconds_to_packet(self, within: float) -> float:
        began_at = time.monotonic()
        while not self.namespace.run(["ping", "-c1", "-W1", str(self.link.server_address)], check=False).count(" 1 received"):
            if time.monotonic() - began_at > within:
                return float("inf")
        return time.monotonic() - began_at


@contextmanager
def joined(net: Net, url: str, **options: object) -> Iterator[Joined]:
    events: list[LinkEvent] = []
    context = connect(url, uuid=str(uuid.uuid4()), device="userspace", on_event=events.append, **options)  # type: ignore[arg-type]
    with net.machine.portal() as portal, portal.wrap_async_context_manager(context) as link:
        yield Joined(net.machine, portal, link, events)


def one(event: str, seconds: float, reach: float) -> Figure:
    return Figure(event, 1, () if seconds == float("inf") else (seconds,), reach)


def roaming(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    """The machine's address changes; its next packet is answered, within a round trip."""
    with served(net.server, folder), joined(net, URL) as machine:
        time.sleep(SETTLE)
        net.machine.add_address("eth0", "192.0.2.77/24")
        net.machine.remove_address("eth0", "192.0.2.2/24")
        return [one("machine's address changes", machine.seconds_to_packet(20), 1)]


def cut(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    """The stream's connection is reset for a moment. Counts from the reset to the handshake through the new stream."""
    with served(net.server, folder), joined(net, TUNNEL_URL) as machine:
        time.sleep(SETTLE)
        net.server.run(["ss", "-K", "sport", "=", ":4000"])
        began_at = time.time()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = [e for e in machine.events if isinstance(e, StateChanged) and e.time >= began_at - 0.5]
            if found and found[-1].new is ConnectionState.CONNECTED:
                return [one("tunnel's connection reset", found[-1].time - min(e.time for e in found), 1)]
            time.sleep(0.01)
    return [one("tunnel's connection reset", float("inf"), 1)]


def blackhole(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    """One connection is dropped silently; a new one would pass. Counts to the first answered packet, under traffic."""
    with served(net.server, folder), joined(net, TUNNEL_URL) as machine:
        time.sleep(SETTLE)
        [line] = [text for text in net.machine.run(["ss", "-Htn", "dst", f"{SERVER}:4000"]).splitlines() if "ESTAB" in text]
        port = line.split()[3].rpartition(":")[2]
        net.server.nft(RULES.format(f"tcp sport {port} drop"))
        return [one("tunnel's connection blackholed", machine.seconds_to_packet(60), 20)]


def network_down(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    found = []
    for way, url in (("UDP", URL), ("the tunnel", TUNNEL_URL)):
        own = folder / way
        own.mkdir()
        with served(net.server, own), joined(net, url) as machine:
            time.sleep(SETTLE)
            net.machine.set_link("eth0", up=False)
            time.sleep(options.down)
            net.machine.set_link("eth0", up=True)
            seconds = machine.seconds_to_packet(60)
            found.append(one(f"network down {options.down:g} s and back, {way}", seconds, 2))
    return found


def dead_endpoint(net: Net, folder: Path, options: argparse.Namespace) -> list[Figure]:
    """Nothing listens at the first endpoint. Counts from the link's start to the first handshake."""
    net.server.add_address("eth0", "192.0.2.3/24")
    net.server.nft(RULES.format(f"ip daddr {SERVER} udp dport 51820 drop"))
    more = ("--wireguard-endpoint", "192.0.2.3:51820")
    with served(net.server, folder, *more), joined(net, URL) as machine:
        endpoints = [event.seconds for event in machine.events if isinstance(event, Connected)]
        status = machine.portal.call(machine.link.status)
        print(f"  the way in the end: {status.route}", file=sys.stderr)
        return [one("endpoint 1 of 2 dead", endpoints[0], 10)]


SCENARIOS: dict[str, Callable[[Net, Path, argparse.Namespace], list[Figure]]] = {
    "ours": restart_of_ours,
    "others": restart_of_others,
    "key": rotated_key,
    "roaming": roaming,
    "reset": cut,
    "blackhole": blackhole,
    "network": network_down,
    "endpoint": dead_endpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int, default=1000)
    parser.add_argument("--talos", type=int, default=60)
    parser.add_argument("--peers", type=int, default=20)
    parser.add_argument("--down", type=float, default=60.0)
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    options = parser.parse_args()
    print("| event | back | median | worst | reach | met |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.only or SCENARIOS:
        with direct() as net, tempfile.TemporaryDirectory() as folder:
            for row in SCENARIOS[name](net, Path(folder), options):
                print(row.row(), flush=True)


if __name__ == "__main__":
    main()
