"""Two `serve` processes over one Postgres: machines on either, and one server that dies or stops."""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from anyio.from_thread import BlockingPortal
from grpclib import GRPCError

from siderolink import Link, connect
from siderolink.common.addressing import swap_endpoints
from siderolink.common.hostport import HostPort
from tests.netns.test_serve_memory import pings
from tests.support.netns import Namespace, link
from tests.support.postgres import cluster
from tests.support.raw_machine import RawMachine
from tests.support.serving import TOKEN, Served, served

A, B = "192.0.2.1", "198.51.100.1"

log = logging.getLogger(__name__)


@asynccontextmanager
async def balancer(servers: list[str]) -> AsyncIterator[int]:
    """Hands each connection to the first server that takes it; on the machine's own loopback."""
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for address in servers:
            try:
                other, to_other = await asyncio.open_connection(address, 4000)
            except OSError:
                continue
            for one in (pump(reader, to_other), pump(other, writer)):
                task = asyncio.create_task(one)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            return
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()


@dataclass
class Pair:
    """Two servers, a and b, and namespaces for machines, with a router between them all."""

    a: Served
    b: Served
    machines: list[Namespace]
    stack: ExitStack
    database: str

    def is_owned_by(self, server: Served, node_uuid: str) -> bool:
        """Whether the database says so of the machine's link."""
        found = cluster().execute(
            "SELECT servers.endpoints FROM sessions JOIN servers ON servers.id = sessions.server_id"
            f" JOIN machines ON machines.id = sessions.machine_id WHERE machines.node_uuid = '{node_uuid}'",
            self.database,
        )
        return found == [(f"{A if server is self.a else B}:51820",)]

    def join(self, machine: Namespace, options: str = "") -> tuple[Link, str]:
        """A machine of ours, which finds the servers' APIs by a balancer that prefers a."""
        node_uuid = str(uuid.uuid4())
        portal = self.stack.enter_context(machine.portal())
        port = self.stack.enter_context(portal.wrap_async_context_manager(balancer([A, B])))
        context = connect(f"grpc://127.0.0.1:{port}?jointoken={TOKEN}{options}", uuid=node_uuid, device="userspace")
        return self.stack.enter_context(portal.wrap_async_context_manager(context)), node_uuid


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        name = stack.enter_context(cluster().database())
        router, a, b, *machines = [stack.enter_context(Namespace(label)) for label in ("router", "a", "b", "m0", "m1", "m2")]
        router.forward()
        for number, (one, address) in enumerate([(a, A), (b, B), *((one, f"10.0.{n}.1") for n, one in enumerate(machines))]):
            gateway = address.rpartition(".")[0] + ".254"
            link(one, router, names=("eth0", f"down{number}"), addresses=([f"{address}/24"], [f"{gateway}/24"]))
            one.add_route("default", gateway)
        options = ("--store", cluster().url(name), "--device", "userspace", "--state-key-file", str(tmp_path / "key"))
        servers = [
            stack.enter_context(served(one, tmp_path / label, *options, address=address))
            for one, label, address in ((a, "a", A), (b, "b", B))
        ]
        yield Pair(servers[0], servers[1], machines, stack, name)


def until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def existing_machine(namespace: Namespace, server: str) -> Iterator[tuple[RawMachine, str]]:
    """One that knows a single endpoint and calls nobody again, and its address."""
    machine = RawMachine(api=HostPort(server, 4000), node_uuid=str(uuid.uuid4()), join_token=TOKEN)

    @asynccontextmanager
    async def linked() -> AsyncIterator[str]:
        answer = await machine.provision()
        assert swap_endpoints(answer.server_endpoint)[0] == f"{server}:51820"
        assert set(answer.server_endpoint) == {f"{A}:51820", f"{B}:51820"}
        async with machine.device("raw0", answer) as up:
            with anyio.fail_after(20):
                await up.connected.wait()
            yield answer.node_address_prefix.partition("/")[0]

    with namespace.portal() as portal, portal.wrap_async_context_manager(linked()) as address:
        yield machine, address


def refusal_of_a_thief(portal: BlockingPortal, node_uuid: str) -> str:
    """What server b says to a stranger that knows the machine's UUID."""

    async def call() -> str:
        try:
            await RawMachine(api=HostPort(B, 4000), node_uuid=node_uuid, join_token=TOKEN).provision()
        except GRPCError as error:
            return error.status.name
        return "admitted"

    return portal.call(call)


def test_machines_go_on_at_the_other_server_when_their_own_is_killed(pair: Pair) -> None:
    by_udp, by_tunnel = pair.join(pair.machines[0]), pair.join(pair.machines[1], "&grpc_tunnel=true")
    with existing_machine(pair.machines[2], A) as (raw, raw_address):
        machines = [(by_udp[0].address, by_udp[1]), (by_tunnel[0].address, by_tunnel[1]), (raw_address, raw.node_uuid)]
        for address, node_uuid in machines:
            assert pings(pair.a.namespace, address, 20)
            until(lambda: pair.is_owned_by(pair.a, node_uuid))  # noqa: B023
            # an error at once, and no handshake: that would take the machine over
            assert "nreachable" in pair.b.namespace.run(["ping", "-c1", "-W5", str(address)], check=False)
            with pair.machines[2].portal() as portal:
                assert refusal_of_a_thief(portal, node_uuid) == "ALREADY_EXISTS"
            assert pair.is_owned_by(pair.a, node_uuid)
        pair.a.kill()
        killed_at = time.monotonic()
        for address, node_uuid in machines:
            assert pings(pair.b.namespace, address, 30)
            log.info("back after %.1f s", time.monotonic() - killed_at)
            until(lambda: pair.is_owned_by(pair.b, node_uuid))  # noqa: B023
        pair.a.start()
        for address, node_uuid in machines:  # who comes back takes nobody
            assert pings(pair.b.namespace, address, 10)
            assert pair.is_owned_by(pair.b, node_uuid)
