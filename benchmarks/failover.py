"""Three servers over one Postgres, and one of them is killed: how soon its machines are back, and at which servers.

    sudo python benchmarks/failover.py [--machines 1000] [--existing 100] [--rounds 1]
    sudo python benchmarks/failover.py --load [--machines 10000] [--rounds 3]

The first: machines of this package (half by UDP, half by the tunnel) and existing ones (by UDP, one endpoint each, which they
never change) send a packet every second. A balancer, a process of its own, gives the API's connections to the servers in
turns. Back is who gets an answer. It prints how long that took, and the same for the machines of the other servers: nothing
happens to these, so their figure is what sending once a second and busy processors add. Then the processor time of each part,
who took the machines and how often each was taken, how many handshakes servers began with each existing machine, and what the
killed server does when it returns.

The second: simulated machines join and connect at three servers, and at one, by turns: joins per second, processor time of all
servers and of Postgres for each, memory of all servers for each, and a restart of all servers at once. In the last turn one of
the three is killed before that, and the others take and dial its machines.

Everything shares this host's processors. Needs root.
"""

import argparse
import asyncio
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.recovery import Machine, Swarm, wait_back, watch_all
from benchmarks.support.scale_net import SOURCES, Process, SwarmProcess, cluster_processor, processor, resident
from siderolink.common.join_url import JoinURL
from tests.support.netns import Namespace, link
from tests.support.packet_machine import PacketMachine
from tests.support.postgres import Cluster
from tests.support.server_pair import balancer
from tests.support.serving import TOKEN, Served, served
from tests.support.talos_machine import TalosMachine
from tests.support.topology import Net
from tests.support.who_sends import Record, recorded

ADDRESSES = ("192.0.2.1", "198.51.100.1", "203.0.113.1")
SETTLE_SECONDS = 20.0
USAGE_SECONDS = 6.0
INITIATION = 1
JOINS_AT_ONCE = 64
_OWNERS = """
    SELECT machines.node_uuid, split_part(servers.endpoints, ':', 1), sessions.epoch
    FROM machines JOIN sessions ON machines.id = sessions.machine_id LEFT JOIN servers ON servers.id = sessions.server_id
"""


@dataclass(frozen=True, slots=True)
class Place:
    """Servers, and a namespace for machines, with a router between them."""

    servers: tuple[Served, ...]
    router: Namespace
    machine: Namespace
    cluster: Cluster
    database: str

    def owners(self) -> dict[str, tuple[str | None, int]]:
        """By UUID, the address of each machine's owner, and how often the link changed owners."""
        found = self.cluster.execute(_OWNERS, self.database)
        return {str(node_uuid): (None if owner is None else str(owner), int(str(epoch))) for node_uuid, owner, epoch in found}


@contextmanager
def place(count: int, *more: str) -> Iterator[Place]:
    cluster = Cluster(is_durable=True)
    with ExitStack() as stack:
        stack.callback(cluster.close)
        database = stack.enter_context(cluster.database())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        router, machine = (stack.enter_context(Namespace(label)) for label in ("router", "machine"))
        hosts = [stack.enter_context(Namespace(f"server{number}")) for number in range(count)]
        router.forward()
        ends = [*zip(hosts, ADDRESSES, strict=False), (machine, "10.0.0.1")]
        for number, (host, address) in enumerate(ends):
            gateway = address.rpartition(".")[0] + ".254"
            link(host, router, names=("eth0", f"down{number}"), addresses=([f"{address}/24"], [f"{gateway}/24"]))
            host.add_route("default", gateway)
        router.run(["ip", "route", "add", SOURCES, "via", "10.0.0.1"])
        machine.run(["ip", "route", "add", "local", SOURCES, "dev", "lo"])
        options = ["--store", cluster.url(database), "--device", "userspace", "--state-key-file", str(folder / "key")]
        options += ["--connections-per-address", "20000", *more]
        servers = [
            stack.enter_context(served(host, folder / host.name, "--peer-listen", f"{address}:4001", *options, address=address))
            for host, address in zip(hosts, ADDRESSES, strict=False)
        ]
        yield Place(tuple(servers), router, machine, cluster, database)


# --- one is killed


def tell(what: str, machines: Sequence[Machine], since: float, reach: float) -> None:
    took = sorted(at - since for machine in machines if (at := machine.answers.first_at) is not None)
    if not took:
        print(f"{what}: none of {len(machines)} is back", flush=True)
        return
    p99 = took[min(len(took) - 1, int(len(took) * 0.99))]
    is_met = len(took) == len(machines) and took[-1] <= reach
    print(
        f"{what}: {len(took)} of {len(machines)} are back; median {statistics.median(took):.2f} s, p99 {p99:.2f} s, "
        f"most {took[-1]:.2f} s (reach {reach:g} s: {'met' if is_met else 'NOT MET'})",
        flush=True,
    )


def uuid_of(machine: Machine) -> str:
    if isinstance(machine, PacketMachine):
        return machine.runner.options.machine.uuid
    assert isinstance(machine, TalosMachine)
    return machine.node_uuid


def initiations(record: Record, since: int, server: str | None = None) -> Counter[tuple[str, int]]:
    """How many initiations the servers sent, by the machine's port."""
    return Counter(
        (one.server, one.port)
        for one in record.seen[since:]
        if one.is_from_server and one.kind == INITIATION and server in (None, one.server)
    )


class Usage:
    """Processor time: of the servers that stay, of Postgres, and of what belongs to the benchmark."""

    def __init__(self, net: Place, balancing: Process) -> None:
        self._net, self._balancing = net, balancing
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        return {
            "the servers": processor_of(self._net.servers[1:]),
            "Postgres": cluster_processor(self._net.cluster),
            "the balancer": self._balancing.cpu,
            "the machines": time.process_time(),
        }

    def taken(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        before, self._before = self._before, self._now()
        return {name: used - before[name] for name, used in self._before.items()}


def tell_usage(usage: Usage, idle: dict[str, float]) -> None:
    said = ", ".join(f"{name} {used:.2f} s ({used - idle[name]:+.2f})" for name, used in usage.taken().items())
    print(f"processor time of {USAGE_SECONDS:g} s (beyond what packets alone cost): {said}", flush=True)


def kill_one(options: argparse.Namespace) -> None:
    with place(3) as net, ExitStack() as stack:
        portal = stack.enter_context(net.machine.portal())
        balancing = Process(net.machine, [sys.executable, __file__, "--balancer"])
        stack.callback(balancing.stop)
        url = f"grpc://127.0.0.1:{int(balancing.line())}?jointoken={TOKEN}"
        ours = {way: [PacketMachine(JoinURL.parse(url + more)) for _ in range(options.machines // 2)] for way, more in WAYS}
        existing = [TalosMachine(JoinURL.parse(url), sends=True) for _ in range(options.existing)]
        everyone: list[Machine] = [*ours["UDP"], *ours["the tunnel"], *existing]
        swarm = Swarm(everyone, lambda machine: False)
        record = stack.enter_context(recorded(net.router))
        future, _ = portal.start_task(swarm.run)
        stack.callback(future.cancel)
        watch_all(swarm)
        wait_back(swarm, 300)
        print(f"{swarm.back()} of {len(everyone)} machines are connected", flush=True)
        time.sleep(SETTLE_SECONDS)
        usage = Usage(net, balancing)
        time.sleep(USAGE_SECONDS)
        idle = usage.taken()
        before, mark = net.owners(), record.mark()
        print(f"owners before: {dict(Counter(owner for owner, _ in before.values()))}")
        victim = net.servers[0]
        gone = {node_uuid for node_uuid, (owner, _) in before.items() if owner == victim.address}
        usage.taken()
        victim.kill()
        watch_all(swarm)
        since = time.monotonic()
        time.sleep(USAGE_SECONDS)
        tell_usage(usage, idle)
        wait_back(swarm, 60)
        of = {name: [one for one in group if uuid_of(one) in gone] for name, group in ours.items()}
        for name, group in of.items():
            tell(f"ours by {name}, of the killed server", group, since, 5)
            tell(
                f"ours by {name}, of the others: the measure's own share",
                [one for one in ours[name] if one not in group],
                since,
                5,
            )
        tell("existing ones by UDP, of the killed server", [one for one in existing if uuid_of(one) in gone], since, 10)
        time.sleep(5)
        after = net.owners()
        taken = Counter(after[node_uuid][0] for node_uuid in gone)
        times = Counter(after[node_uuid][1] - before[node_uuid][1] for node_uuid in gone)
        moved = sum(after[one][0] != before[one][0] for one in before if one not in gone)
        print(f"they are now at {dict(taken)}; times that one was taken: {dict(times)}; others that moved: {moved}")
        dialled = initiations(record, mark)
        by_port = Counter(where for _, where in dialled)
        print(f"machines dialled: {len(by_port)}; servers that dialled one: {dict(Counter(by_port.values()))}", flush=True)
        comes_back(net, victim, record, after)


def comes_back(net: Place, victim: Served, record: Record, before: dict[str, tuple[str | None, int]]) -> None:
    """It starts no handshake with machines of other servers, and accepts those that begin one."""
    mark, lines = record.mark(), len(victim.lines)
    victim.start()
    time.sleep(30)
    dialled = sum(initiations(record, mark, victim.address).values())
    seen = [one for one in record.seen[mark:] if one.server == victim.address and one.kind == INITIATION]
    each = Counter(int(one.at) for one in seen)
    moved = sum(owner != before[one][0] for one, (owner, _) in net.owners().items() if one in before)
    print(
        f"30 s after its return: {dialled} handshakes begun by it, {len(seen)} at it in all, {max(each.values(), default=0)} "
        f"in one second at most; {moved} machines moved; {len(victim.lines) - lines} lines of its log",
        flush=True,
    )


WAYS = (("UDP", ""), ("the tunnel", "&grpc_tunnel=true"))


# --- three against one


@dataclass(frozen=True, slots=True)
class Load:
    """The results of one round."""

    joins: float
    """A second."""
    servers: float
    """Milliseconds of processor time of all servers per join."""
    database: float
    """Of Postgres."""
    memory: float
    """Kilobytes of all servers per machine."""
    serving: float
    """Seconds from the start of all servers at once until each serves."""
    restart: float
    """Seconds of processor time of all servers until then."""
    back: float
    """Seconds from then until every machine has a session."""


def processor_of(servers: Sequence[Served]) -> float:
    return sum(processor(server.pid) for server in servers)


def load(count: int, machines: int, *, kills: bool) -> Load:
    """Machines join, connect, and reconnect after all servers were stopped and started at once."""
    with place(count, "--drain-timeout", "0") as net, ExitStack() as stack:
        empty = sum(resident(server.pid) for server in net.servers)
        share = machines // 3
        urls = [f"grpc://{net.servers[number % count].address}:4000?jointoken={TOKEN}" for number in range(3)]
        nets = Net(net.servers[0].namespace, (net.machine,))
        blocks = [f"198.18.{number * 64}.0/18" for number in range(3)]
        used, theirs = processor_of(net.servers), cluster_processor(net.cluster)
        swarms = [
            SwarmProcess(nets, share, sources=block, url=url, at_once=JOINS_AT_ONCE // 3)
            for block, url in zip(blocks, urls, strict=True)
        ]
        for swarm in swarms:
            stack.callback(swarm.stop)
        made = 3 * share
        rate = made / max(swarm.phase()["seconds"] for swarm in swarms)
        used, theirs = processor_of(net.servers) - used, cluster_processor(net.cluster) - theirs
        for swarm in swarms:
            swarm.phase()
        time.sleep(SETTLE_SECONDS)
        memory = sum(resident(server.pid) for server in net.servers) - empty
        if kills:
            take_a_third(net, made)
            net.servers[0].start()
        with ThreadPoolExecutor(count) as threads:
            list(threads.map(Served.stop, net.servers))
            began = time.monotonic()
            list(threads.map(Served.start, net.servers))
        serving, restart = time.monotonic() - began, processor_of(net.servers)
        for swarm in swarms:
            swarm.signal(signal.SIGUSR1)
        back = max(swarm.phase()["seconds"] for swarm in swarms)
        each = Load(rate, used / made * 1000, theirs / made * 1000, memory / made, serving, restart, back)
        print(
            f"{count} servers, {made} machines: {each.joins:.0f} joins/s, each {each.servers:.2f} ms of processor time of all "
            f"servers and {each.database:.2f} of Postgres; {each.memory:.1f} KB of all servers for a machine; started at once, "
            f"all serve after {each.serving:.1f} s, {each.restart:.1f} s of processor time, and {each.back:.1f} s later all "
            "machines are back",
            flush=True,
        )
        return each


def compare_loads(rounds: int, machines: int) -> None:
    """Measure one server and three in turn; then print the medians."""
    found: dict[int, list[Load]] = {1: [], 3: []}
    for turn in range(rounds):
        for count in (1, 3) if turn % 2 == 0 else (3, 1):
            found[count].append(load(count, machines, kills=count == 3 and turn == rounds - 1))
    for one in fields(Load):
        alone, three = (statistics.median(getattr(each, one.name) for each in found[count]) for count in (1, 3))
        print(f"{one.name}: {alone:.2f} with one server, {three:.2f} with three: {three / alone:.2f} x")


def take_a_third(net: Place, machines: int) -> None:
    victim = net.servers[0]
    before = {one for one, (owner, _) in net.owners().items() if owner == victim.address}
    start = processor_of(net.servers[1:])
    victim.kill()
    since = time.monotonic()
    left = len(before)
    while left and time.monotonic() - since < 120:
        time.sleep(0.5)
        owners = net.owners()
        left = sum(owners[one][0] in (victim.address, None) for one in before)
    seconds = time.monotonic() - since
    spent = processor_of(net.servers[1:]) - start
    taken = Counter(net.owners()[one][0] for one in before)
    print(
        f"one of three killed with {len(before)} of {machines} machines: all but {left} taken after {seconds:.1f} s, "
        f"by {dict(taken)}; {spent / max(1, len(before)) * 1000:.2f} ms of the others' processor time for each",
        flush=True,
    )


async def balance() -> None:
    """Balance until the process ends; says the port."""
    async with balancer(list(ADDRESSES), is_fair=True) as port:
        print(port, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", type=int)
    parser.add_argument("--existing", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--balancer", action="store_true", help="what the benchmark itself starts")
    options = parser.parse_args()
    if options.balancer:
        uvloop.run(balance())
        return
    options.machines = options.machines or (10_000 if options.load else 1000)
    print(subprocess.run(["uptime"], capture_output=True, text=True, check=True).stdout.strip())
    if options.load:
        compare_loads(options.rounds, options.machines)
        return
    for _ in range(options.rounds):
        kill_one(options)


if __name__ == "__main__":
    main()
