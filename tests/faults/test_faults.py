"""What can happen to two servers of one database, and what may never follow: a machine that two of them send to.

Server a's clock is five seconds ahead. Server b reaches the database by pgbouncer. Both send to all machines all the time.
"""

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.netns.test_serve_memory import pings
from tests.support.database_relay import DatabaseRelay, database_relay
from tests.support.netns import Namespace, stop
from tests.support.postgres import cluster, faketime, pgbouncer
from tests.support.server_pair import A, B, Pair, existing_machine, server_pair
from tests.support.serving import Served
from tests.support.who_sends import Record, recorded

log = logging.getLogger(__name__)

FAULT_SECONDS = 8.0
"""Longer than the time after which a server is declared dead."""
STOPPED_SECONDS = 30.0

pytestmark = pytest.mark.timeout(600)


class Lateness(threading.Thread):
    """How late this host wakes sleeping processes, and so its servers."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.worst = 0.0
        self.start()

    def run(self) -> None:
        while True:
            began = time.monotonic()
            time.sleep(0.05)
            self.worst = max(self.worst, time.monotonic() - began - 0.05)


@dataclass
class Faulty:
    pair: Pair
    relays: dict[str, DatabaseRelay]
    machines: dict[str, object]
    """The overlay address of each, by UUID."""
    record: Record
    lateness: Lateness

    def server(self, address: str) -> Served:
        return self.pair.a if address == A else self.pair.b

    def owners(self) -> dict[str, str | None]:
        return {node_uuid: self.pair.owner_of(node_uuid) for node_uuid in self.machines}

    def epochs(self) -> list[tuple[object, ...]]:
        return self.pair.cluster.execute("SELECT machine_id, server_id, epoch FROM sessions ORDER BY 1", self.pair.database)

    def others_first(self, address: str) -> None:
        """Balancers try this server last."""
        self.pair.preferred.sort(key=lambda one: one == address)

    def passes_at(self, addresses: set[str], seconds: float = 90) -> None:
        """Each machine is at one of these servers, which passes packets to it."""
        deadline = time.monotonic() + seconds
        while not set(self.owners().values()) <= addresses and time.monotonic() < deadline:
            time.sleep(0.1)
        for node_uuid, address in self.machines.items():
            owner = self.pair.owner_of(node_uuid)
            assert owner in addresses, (self.owners(), self.machines)
            assert pings(self.server(owner).namespace, address, seconds), node_uuid

    @contextmanager
    def held(self) -> Iterator[None]:
        """Whatever happens meanwhile, nobody gets another address, and no two servers send to one machine."""
        since, late_before = self.record.mark(), self.lateness.worst
        self.lateness.worst = 0.0
        yield
        self.passes_at({A, B})
        time.sleep(3.0)  # a server that still sends would do so now
        assert self.record.fights(since, spare=4 * self.lateness.worst) == []
        self.lateness.worst = max(late_before, self.lateness.worst)
        rows = self.pair.cluster.execute("SELECT node_uuid, overlay_address FROM machines", self.pair.database)
        assert {str(node_uuid) for node_uuid, _ in rows} == set(self.machines)
        assert len({overlay for _, overlay in rows}) == len(rows) == len(self.machines)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faults")
    folder.chmod(0o755)
    with ExitStack() as stack:
        name = stack.enter_context(cluster().database())
        (folder / "pooler").mkdir()
        port = stack.enter_context(pgbouncer(folder / "pooler", name)).rpartition(":")[2].partition("/")[0]
        relays = {
            A: stack.enter_context(database_relay(folder / "gate-a", cluster().folder / f".s.PGSQL.{cluster().port}")),
            B: stack.enter_context(database_relay(folder / "gate-b", ("127.0.0.1", int(port)))),
        }
        clock = {"LD_PRELOAD": faketime(), "FAKETIME": "+5s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        pair = stack.enter_context(
            server_pair(folder, cluster(), name, (relays[A].url(name), relays[B].url(name)), environment=clock)
        )
        by_udp, by_tunnel = pair.join(pair.machines[0]), pair.join(pair.machines[1], "&grpc_tunnel=true")
        raw, raw_link = stack.enter_context(existing_machine(pair.machines[2], A))
        machines: dict[str, object] = {
            by_udp[1]: by_udp[0].address,
            by_tunnel[1]: by_tunnel[0].address,
            raw.node_uuid: raw_link.address,
        }
        stack.callback(pair.stack.close)
        record = stack.enter_context(recorded(pair.router))
        for server in (pair.a, pair.b):
            for address in machines.values():
                stack.callback(stop, traffic(server.namespace, address))
        yield Faulty(pair, relays, machines, record, Lateness())
        for server in (pair.a, pair.b):  # to explain a failed test
            log.info("%s said:\n%s", server.address, server.said())


def traffic(namespace: Namespace, address: object) -> "subprocess.Popen[str]":
    """Pings all the time."""
    return namespace.popen(["ping", "-q", "-i0.2", str(address)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_the_database_is_cut_for_all(fleet: Faulty) -> None:
    fleet.passes_at({A})
    before = fleet.epochs()
    with fleet.held():
        for one in fleet.relays.values():
            one.cut()
        time.sleep(FAULT_SECONDS)
        for address in fleet.machines.values():
            assert pings(fleet.pair.a.namespace, address, 30)
        for one in fleet.relays.values():
            one.open()
    assert fleet.epochs() == before


def test_a_server_is_stopped_for_half_a_minute(fleet: Faulty) -> None:
    fleet.passes_at({A})
    with fleet.held():
        fleet.others_first(A)
        fleet.pair.a.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            fleet.passes_at({B})
            time.sleep(max(0.0, began + STOPPED_SECONDS - time.monotonic()))
        finally:
            fleet.pair.a.signal(signal.SIGCONT)


def test_a_split_that_heals(fleet: Faulty) -> None:
    fleet.passes_at({B})
    with fleet.held():
        fleet.others_first(B)
        fleet.relays[B].silence()
        drop = f"type filter hook forward priority 0; ip saddr {B} drop; ip daddr {B} drop"
        fleet.pair.router.nft(f"table ip split {{ chain forward {{ {drop}\n}}\n}}")
        fleet.passes_at({A})
        fleet.pair.router.nft("delete table ip split")
        fleet.relays[B].open()


def test_the_database_is_cut_for_the_server_that_has_the_machines(fleet: Faulty) -> None:
    """The server continues, and stops sending to a machine that another one takes, although it cannot learn of that."""
    fleet.passes_at({A})
    with fleet.held():
        fleet.relays[A].cut()
        time.sleep(FAULT_SECONDS)
        fleet.relays[A].open()
