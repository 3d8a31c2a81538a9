"""`serve` on Postgres: through an outage, a kill, and a move to a file."""

import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpclib import GRPCError, Status

from siderolink.common.hostport import HostPort
from tests.netns.test_serve_memory import joined, pings
from tests.support.postgres import Cluster
from tests.support.raw_machine import RawMachine
from tests.support.serving import SERVER, TOKEN, served
from tests.support.topology import Net, direct


@pytest.fixture
def net() -> Iterator[Net]:
    with direct() as net:
        yield net


@pytest.fixture
def postgres() -> Iterator[Cluster]:
    found = Cluster(is_durable=True)
    try:
        found.execute("CREATE DATABASE state")
        yield found
    finally:
        found.close()


async def join() -> str | None:
    """Why a new machine is refused as UNAVAILABLE; None if it is not."""
    try:
        await RawMachine(api=HostPort(SERVER, 4000), node_uuid=str(uuid.uuid4()), join_token=TOKEN).provision()
    except GRPCError as error:
        return error.message if error.status is Status.UNAVAILABLE else None
    return None


def test_links_outlive_the_database_and_joins_come_back_with_it(net: Net, tmp_path: Path, postgres: Cluster) -> None:
    url = postgres.url("state")
    with served(net.server, tmp_path, "--store", url) as server, joined(net.machine) as (link, portal):
        address = link.address
        assert pings(net.server, address, 5)
        postgres.stop(signal.SIGQUIT)
        assert portal.call(join) == "the server's database does not answer; try again"
        assert pings(net.server, address, 5)
        postgres.start()
        assert portal.call(join) is None
        assert pings(net.server, address, 5)
        server.kill()
        server.start()
        assert f"machines, in {url}" in server.lines[-1]
        assert pings(net.server, address, 20)
        assert "a server uses the database state" in server.command(
            ["state", "migrate", url, str(tmp_path / "moved")], check=False
        )
        assert server.stop(timeout=30) == 0
        moved = tmp_path / "again" / "state" / "siderolink.state"
        moved.parent.mkdir(parents=True)
        server.command(["state", "migrate", url, str(moved)])
        with served(net.server, tmp_path / "again") as again:
            assert " 0 machines" not in again.lines[-1]
            assert pings(net.server, address, 20)
            assert link.address == address


def test_a_password_in_the_url_is_refused_without_repeating_it(net: Net, tmp_path: Path, postgres: Cluster) -> None:
    with served(net.server, tmp_path, "--store", postgres.url("state")) as server:
        said = server.command(["state", "migrate", "postgresql://u:s3cret@192.0.2.9/x", "copy"], check=False)
        assert "--store-password-file" in said
        assert "s3cret" not in said
