"""`serve` on Postgres: an outage, a kill, a move to a file, an old backup, a replica that lacks the last commits."""

import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from grpclib import GRPCError, Status

from siderolink.common.hostport import HostPort
from siderolink.common.pb.sidero.link import ProvisionResponse
from siderolink.common.wireguard.noise.tai64n import Timestamps
from siderolink.server.store.sealing import is_sealed
from tests.netns.test_serve_memory import joined, pings
from tests.support.postgres import Cluster
from tests.support.raw_machine import RawMachine
from tests.support.serving import SERVER, TOKEN, Served, served
from tests.support.topology import Net, direct
from tests.support.waiting import until

CLOCK_AHEAD = 3600
"""Seconds by which the database's clock is off."""


@pytest.fixture
def net() -> Iterator[Net]:
    with direct() as net:
        yield net


@pytest.fixture
def postgres() -> Iterator[Cluster]:
    found = Cluster(is_durable=True, clock_ahead=CLOCK_AHEAD)
    try:
        found.execute("CREATE DATABASE state")
        yield found
    finally:
        found.close()


def raw_machine() -> RawMachine:
    return RawMachine(api=HostPort(SERVER, 4000), node_uuid=str(uuid.uuid4()), join_token=TOKEN)


def shake_hands(portal: BlockingPortal, machine: RawMachine, answer: ProvisionResponse) -> None:
    """Bring the machine's link up, and leave."""

    async def connect() -> None:
        async with machine.device("raw0", answer) as link:
            with anyio.fail_after(30):
                await link.connected.wait()

    portal.call(connect)


def linked_at(postgres: Cluster, machine: RawMachine) -> float:
    """When its first handshake was, once that is written."""
    asked = f"SELECT linked_at FROM machines WHERE node_uuid = '{machine.node_uuid}'"
    until(lambda: isinstance(postgres.execute(asked, "state")[0][0], float))
    return float(str(postgres.execute(asked, "state")[0][0]))


async def join() -> str | None:
    """Why a new machine is refused as UNAVAILABLE; None if it is not."""
    try:
        await raw_machine().provision()
    except GRPCError as error:
        return error.message if error.status is Status.UNAVAILABLE else None
    return None


def test_links_outlive_the_database_and_joins_come_back_with_it(net: Net, tmp_path: Path, postgres: Cluster) -> None:
    url = postgres.url("state")
    with served(net.server, tmp_path, "--store", url) as server, joined(net.machine) as (link, portal):
        address = link.address
        assert pings(net.server, address, 60)
        key = ["--state-key-file", str(server.state_key)]
        [(sealed,)] = postgres.execute("SELECT private_key FROM server", "state")
        assert isinstance(sealed, bytes)
        assert is_sealed(sealed)
        known, new = raw_machine(), raw_machine()
        answers = [portal.call(machine.provision) for machine in (known, new)]
        shake_hands(portal, known, answers[0])
        linked_at(postgres, known)
        postgres.stop(signal.SIGQUIT)
        assert portal.call(join) == "the server's database does not answer; try again"
        assert pings(net.server, address, 60)
        for machine, answer in zip((known, new), answers, strict=True):
            shake_hands(portal, machine, answer)
        postgres.start()
        assert portal.call(join) is None
        assert pings(net.server, address, 60)
        # the first handshake of its life, which could not be written then; all times are the database's
        assert abs(linked_at(postgres, new) - CLOCK_AHEAD - time.time()) < 120
        server.kill()
        server.start()
        assert f"machines, in {url}" in server.lines[-1]
        assert pings(net.server, address, 60)
        assert "a server uses the database state" in server.command(
            ["state", "migrate", url, str(tmp_path / "moved"), *key], check=False
        )
        assert server.stop(timeout=30) == 0
        moved = tmp_path / "again" / "state" / "siderolink.state"
        moved.parent.mkdir(parents=True)
        server.command(["state", "migrate", url, str(moved), *key])
        with served(net.server, tmp_path / "again", *key) as again:
            assert " 0 machines" not in again.lines[-1]
            assert pings(net.server, address, 60)
            assert link.address == address


def test_after_an_old_backup_machines_return_and_those_since_join_again(net: Net, tmp_path: Path, postgres: Cluster) -> None:
    url = postgres.url("state")
    with served(net.server, tmp_path, "--store", url) as server, joined(net.machine) as (link, portal):
        address = link.address
        assert pings(net.server, address, 60)
        assert server.stop(timeout=30) == 0
        postgres.run("pg_dump", "--format=custom", "--file=dump", "state")
        server.start(until="1 machines")
        assert pings(net.server, address, 60)
        since = raw_machine()
        shake_hands(portal, since, portal.call(since.provision))
        # Only a handshake that the server begins can succeed: the machine refuses a timestamp that is not above the last one.
        net.server.nft("""
            table inet only_answers {
                chain input {
                    type filter hook input priority 0
                    tcp dport 4000 drop
                    udp dport 51820 @th,64,8 1 drop
                }
            }
        """)
        assert server.stop(timeout=30) == 0
        [(latest,)] = postgres.execute("SELECT timestamp_mark FROM server", "state")
        postgres.run("pg_restore", "--clean", "--if-exists", "--single-transaction", "--dbname=state", "dump")
        restored_at = Timestamps().next(time.time_ns())
        server.start(until="1 machines")
        server.wait_for("handshake")
        assert pings(net.server, address, 60)
        assert link.address == address
        net.server.nft("delete table inet only_answers")
        shake_hands(portal, since, portal.call(since.provision))
        assert server.stop(timeout=30) == 0
        rows = postgres.execute("SELECT node_uuid, overlay_address, was_linked FROM machines", "state")
        assert len({row[0] for row in rows}) == len({row[1] for row in rows}) == 2
        assert all(row[2] for row in rows)
        [(mark,)] = postgres.execute("SELECT timestamp_mark FROM server", "state")
        assert isinstance(mark, bytes)
        assert isinstance(latest, bytes)
        assert mark > max(restored_at, latest)


def test_a_machine_whose_row_a_promoted_replica_lacks_joins_again(net: Net, tmp_path: Path, postgres: Cluster) -> None:
    replica = Cluster(copy_of=postgres)
    hosts = "&".join(f"host={one.folder}:{one.port}" for one in (postgres, replica))
    url = f"postgresql://siderolink@/state?{hosts}&target_session_attrs=read-write"
    try:
        with served(net.server, tmp_path, "--store", url):
            count = "SELECT count(*) FROM machines"
            with net.machine.portal() as portal:
                kept = raw_machine()
                portal.call(kept.provision)
            until(lambda: replica.execute(count, "state") == [(1,)])
            replica.stop()
            with joined(net.machine) as (link, _):
                assert pings(net.server, link.address, 60)
                until(lambda: postgres.execute(count, "state") == [(2,)])
                postgres.stop(signal.SIGQUIT)
                replica.start()
                replica.execute("SELECT pg_promote()")
                until(lambda: replica.execute(count, "state") == [(2,)])
                until(lambda: pings(net.server, link.address, 1))
                rows = replica.execute("SELECT overlay_address FROM machines", "state")
                assert link.address.packed in [row[0] for row in rows]
    finally:
        replica.close()


def test_a_password_in_the_url_is_refused_without_repeating_it(net: Net, tmp_path: Path) -> None:
    host = Served(net.server, tmp_path)
    said = host.command(["state", "migrate", "postgresql://u:s3cret@192.0.2.9/x", "copy"], check=False)
    assert "--store-password-file" in said
    assert "s3cret" not in said
