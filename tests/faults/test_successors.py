"""Who has a machine next: when its server is killed, while it drains, and when a replica of the database is promoted."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from siderolink.client import Link
from tests.faults.test_faults import Faulty, Lateness, traffic
from tests.netns.test_serve_memory import pings
from tests.support.netns import Namespace, stop
from tests.support.postgres import Cluster, cluster
from tests.support.server_pair import A, B, Pair, existing_machine, server_pair
from tests.support.waiting import until
from tests.support.who_sends import recorded

OURS_SECONDS = 5.0
OTHERS_SECONDS = 10.0

log = logging.getLogger(__name__)

pytestmark = pytest.mark.timeout(600)


def only_answers(machine: Namespace) -> None:
    """Like behind a NAT, only answers reach this host."""
    machine.nft("""
        table inet only_answers {
            chain in {
                type filter hook input priority 0; policy drop;
                ct state established,related accept
                iifname { "lo", "siderolink" } accept
                icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
            }
        }
    """)


@contextmanager
def faulty(folder: Path, of: Cluster, database: str, url: str) -> Iterator[tuple[Faulty, Link]]:
    """Two servers; a machine of ours behind a NAT, with its link at a and its API connection at b; and an existing one at a."""
    with ExitStack() as stack:
        pair = stack.enter_context(server_pair(folder, of, database, (url, url)))
        only_answers(pair.machines[0])
        ours, node_uuid = pair.join(pair.machines[0], is_fair=True)
        existing, raw = stack.enter_context(existing_machine(pair.machines[2], A))
        stack.callback(pair.stack.close)
        machines: dict[str, object] = {node_uuid: ours.address, existing.node_uuid: raw.address}
        record = stack.enter_context(recorded(pair.router))
        for server in (pair.a, pair.b):
            stack.callback(stop, traffic(server.namespace, raw.address))
        yield Faulty(pair, {}, machines, record, Lateness()), ours


def drain(pair: Pair, server: str, timeout: str = "60s") -> str:
    """The last line of the command's output."""
    return (pair.a if server == A else pair.b).command(["drain", "--timeout", timeout]).splitlines()[-1]


def test_successors_of_killed_and_drained_servers(tmp_path: Path) -> None:
    with cluster().database() as name, faulty(tmp_path, cluster(), name, cluster().url(name)) as (fleet, ours):
        pair, (node_uuid, existing) = fleet.pair, fleet.machines
        fleet.passes_at({A})
        connections = pair.machines[0].run(["ss", "-Htn", "state", "established", "dport", "=", ":4000"])
        assert (A in connections, B in connections) == (False, True)
        until(lambda: f"{A}:4001" in pair.b.namespace.run(["ss", "-Htn", "state", "established"]))

        fleet.others_first(A)
        with fleet.held():
            killed_at = time.monotonic()
            pair.a.kill()
            until(lambda: pings(pair.b.namespace, ours.address, 1))
            took = time.monotonic() - killed_at
            log.info("back after %.1f s", took)
            assert pings(pair.b.namespace, fleet.machines[existing], OTHERS_SECONDS)
            assert "closed its connection and refuses another one" in pair.b.said()
            assert took < OURS_SECONDS + 4 * fleet.lateness.worst, pair.b.said()
            assert fleet.owners() == {node_uuid: B, existing: B}
            pair.a.start()
            until(lambda: cluster().execute("SELECT count(*) FROM servers", name) == [(2,)])
            assert fleet.owners() == {node_uuid: B, existing: B}

        with fleet.held():
            assert drain(pair, B).startswith("no machine is left")
            assert fleet.owners() == {node_uuid: A, existing: A}


def test_a_promoted_replica_that_lacks_the_last_takeovers(tmp_path: Path) -> None:
    primary = Cluster()
    replica = Cluster(copy_of=primary)
    hosts = "&".join(f"host={one.folder}:{one.port}" for one in (primary, replica))
    url = f"postgresql://siderolink@/postgres?{hosts}&target_session_attrs=read-write"
    try:
        with faulty(tmp_path, primary, "postgres", url) as (fleet, ours):
            pair = fleet.pair
            fleet.passes_at({A})
            before = fleet.epochs()
            owners = "SELECT machine_id, server_id, epoch FROM sessions ORDER BY 1"
            until(lambda: replica.execute(owners) == before)
            replica.stop()
            assert drain(pair, A).startswith("no machine is left")
            pair.a.command(["drain", "--undo"])
            fleet.passes_at({B})
            with fleet.held():
                address = ours.address
                primary.stop(signal.SIGQUIT)
                replica.start()
                assert replica.execute(owners) == before
                replica.execute("SELECT pg_promote()")
                pair.cluster = replica
                until(lambda: set(fleet.owners().values()) == {B}, 60)
                assert ours.address == address
            assert all(now[2] > was[2] for now, was in zip(fleet.epochs(), before, strict=True))  # type: ignore[operator]
            # the next dead server has a successor, too
            pair.b.kill()
            fleet.passes_at({A})
    finally:
        primary.close()
        replica.close()
