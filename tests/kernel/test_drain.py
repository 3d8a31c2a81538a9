"""Whole servers with the kernel's WireGuard over one Postgres, and a machine that moves when they drain."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import anyio
import pytest
from anyio.from_thread import BlockingPortal

import siderolink
from siderolink import Link
from siderolink.cli.demo.probe import EchoCount, keep_pinging
from siderolink.client import Disconnected, LinkEvent, Moved
from siderolink.server import Server
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.kernel_server import TOKEN, kernel_server
from tests.support.netns import Namespace
from tests.support.pings import ping
from tests.support.postgres import cluster
from tests.support.topology import several

pytestmark = pytest.mark.timeout(400)  # a database starts, and the processor is emulated


@contextmanager
def serving(namespace: Namespace, address: str, database: str) -> Iterator[tuple[Server, BlockingPortal]]:
    with (
        namespace.portal() as portal,
        portal.wrap_async_context_manager(PostgresStore.open(database, unsealed_secrets=True)) as store,
    ):
        with kernel_server(portal, address, store) as server:
            yield server, portal


@contextmanager
def echoing(link: Link, portal: BlockingPortal) -> Iterator[EchoCount]:
    """One request every 10 ms; all answers have come, or are lost, at the end."""
    echoes, stop = EchoCount(), portal.call(anyio.Event)
    pinging = portal.start_task_soon(partial(keep_pinging, link.server_address, echoes, stop))
    try:
        yield echoes
    finally:
        portal.call(stop.set)
        pinging.result(60)


async def drain_for_a_while(server: Server) -> bool:
    """Whether no machine was left; the server can be used again afterwards."""
    left = [step.left async for step in server.administration.servers.drain(timeout=60)]
    await server.administration.servers.undo_drain()
    return left[-1] == 0


def test_a_machine_leaves_servers_that_drain_without_a_lost_echo() -> None:
    told: list[LinkEvent] = []
    with several(2) as net, cluster().database() as name:
        url = cluster().url(name)
        api = f"grpc://{net.address(0)}:4000?jointoken={TOKEN}"
        machine = siderolink.connect(api, uuid=str(uuid.uuid4()), device="userspace", on_event=told.append)
        with (
            serving(net.servers[0], net.address(0), url) as (a, at_a),
            serving(net.servers[1], net.address(1), url) as (b, at_b),
            net.machines[0].portal() as portal,
            portal.wrap_async_context_manager(machine) as link,
        ):
            ping(net.machines[0], link.server_address)
            with echoing(link, portal) as echoes:
                assert at_a.call(drain_for_a_while, a)
                ping(net.servers[1], link.address)
                # and back, where the machine was before
                assert at_b.call(b.drain, 60.0) == 0
                ping(net.servers[0], link.address)
            assert len(echoes.sent_at) > 200
            assert echoes.lost == []
            moved = [event.route for event in told if isinstance(event, Moved)]
            assert moved == ["udp 192.0.3.1:51820", "udp 192.0.2.1:51820"]
            assert not any(isinstance(event, Disconnected) for event in told)
