"""Two `serve` processes over one Postgres: machines on either, and one server that dies or stops."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal
from grpclib import GRPCError

from siderolink.common.hostport import HostPort
from tests.netns.test_serve_memory import pings
from tests.support.postgres import cluster
from tests.support.raw_machine import RawMachine
from tests.support.server_pair import A, B, Pair, existing_machine, server_pair
from tests.support.serving import TOKEN
from tests.support.waiting import until

log = logging.getLogger(__name__)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with cluster().database() as name:
        url = cluster().url(name)
        with server_pair(tmp_path, cluster(), name, (url, url)) as made:
            yield made


def refusal_of_a_thief(portal: BlockingPortal, node_uuid: str) -> str:
    """Server b's answer to a stranger that knows the machine's UUID."""

    async def call() -> str:
        try:
            await RawMachine(api=HostPort(B, 4000), node_uuid=node_uuid, join_token=TOKEN).provision()
        except GRPCError as error:
            return error.status.name
        return "admitted"

    return portal.call(call)


def test_machines_go_on_at_the_other_server_when_their_own_is_killed(pair: Pair) -> None:
    by_udp, by_tunnel = pair.join(pair.machines[0]), pair.join(pair.machines[1], "&grpc_tunnel=true")
    with existing_machine(pair.machines[2], A) as (raw, raw_link):
        machines = [(by_udp[0].address, by_udp[1]), (by_tunnel[0].address, by_tunnel[1]), (raw_link.address, raw.node_uuid)]
        for address, node_uuid in machines:
            assert pings(pair.a.namespace, address, 60)
            until(lambda: pair.is_owned_by(pair.a, node_uuid))  # noqa: B023
            # an error at once, and no handshake: that would take the machine over
            assert "nreachable" in pair.b.namespace.run(["ping", "-c1", "-W20", str(address)], check=False)
            with pair.machines[2].portal() as portal:
                assert refusal_of_a_thief(portal, node_uuid) == "ALREADY_EXISTS"
            assert pair.is_owned_by(pair.a, node_uuid)
        pair.a.kill()
        killed_at = time.monotonic()
        for address, node_uuid in machines:
            assert pings(pair.b.namespace, address, 60)
            log.info("back after %.1f s", time.monotonic() - killed_at)
            until(lambda: pair.is_owned_by(pair.b, node_uuid))  # noqa: B023
        pair.a.start()
        for address, node_uuid in machines:  # a server that returns takes no machines
            assert pings(pair.b.namespace, address, 60)
            assert pair.is_owned_by(pair.b, node_uuid)
