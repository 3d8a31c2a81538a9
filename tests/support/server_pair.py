"""Two `serve` processes over one database, and machines that reach both through a router."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from siderolink import Link, connect
from siderolink.common.addressing import swap_endpoints
from siderolink.common.hostport import HostPort
from tests.support.netns import Namespace, link
from tests.support.postgres import Cluster
from tests.support.raw_machine import RawLink, RawMachine
from tests.support.serving import TOKEN, Served, served

A, B = "192.0.2.1", "198.51.100.1"
_CONNECT_SECONDS = 10.0


@asynccontextmanager
async def balancer(servers: list[str], *, is_fair: bool = False) -> AsyncIterator[int]:
    """Relays each connection to the first server that accepts it, or with `is_fair` in turn; on the machine's loopback."""
    turns = itertools.count()
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = next(turns) % len(servers) if is_fair else 0
        for address in servers[first:] + servers[:first]:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    other, to_other = await asyncio.open_connection(address, 4000)
            except OSError:
                continue
            for one in (pump(reader, to_other), pump(other, writer)):
                task = asyncio.create_task(one)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            return
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, backlog=1024)
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
    router: Namespace
    machines: list[Namespace]
    stack: ExitStack
    cluster: Cluster
    database: str
    preferred: list[str] = field(default_factory=lambda: [A, B])
    """The servers in the balancers' order."""

    def owner_of(self, node_uuid: str) -> str | None:
        """The address of the server that owns the machine's link, from the database."""
        found = self.cluster.execute(
            "SELECT servers.endpoints FROM sessions JOIN servers ON servers.id = sessions.server_id"
            f" JOIN machines ON machines.id = sessions.machine_id WHERE machines.node_uuid = '{node_uuid}'",
            self.database,
        )
        return str(found[0][0]).partition(":")[0] if found else None

    def is_owned_by(self, server: Served, node_uuid: str) -> bool:
        """Whether the database names this server as the owner of the machine's link."""
        return self.owner_of(node_uuid) == server.address

    def join(self, machine: Namespace, options: str = "", *, is_fair: bool = False) -> tuple[Link, str]:
        """A machine with this package's client; its balancer prefers server a, or takes the servers in turn."""
        node_uuid = str(uuid.uuid4())
        portal = self.stack.enter_context(machine.portal())
        port = self.stack.enter_context(portal.wrap_async_context_manager(balancer(self.preferred, is_fair=is_fair)))
        context = connect(f"grpc://127.0.0.1:{port}?jointoken={TOKEN}{options}", uuid=node_uuid, device="userspace")
        return self.stack.enter_context(portal.wrap_async_context_manager(context)), node_uuid


@contextmanager
def server_pair(
    folder: Path, cluster: Cluster, database: str, urls: tuple[str, str], *, environment: dict[str, str] | None = None
) -> Iterator[Pair]:
    """Each server has its own database URL; `environment` is for server a."""
    with ExitStack() as stack:
        router, a, b, *machines = [stack.enter_context(Namespace(label)) for label in ("router", "a", "b", "m0", "m1", "m2")]
        router.forward()
        for number, (one, address) in enumerate([(a, A), (b, B), *((one, f"10.0.{n}.1") for n, one in enumerate(machines))]):
            gateway = address.rpartition(".")[0] + ".254"
            link(one, router, names=("eth0", f"down{number}"), addresses=([f"{address}/24"], [f"{gateway}/24"]))
            one.add_route("default", gateway)
        options = ("--device", "userspace", "--state-key-file", str(folder / "key"))
        servers = [
            stack.enter_context(
                served(
                    one, folder / label, "--store", url, "--peer-listen", f"{address}:4001", *options, address=address, **more
                )
            )
            for one, label, address, url, more in ((a, "a", A, urls[0], environment or {}), (b, "b", B, urls[1], {}))
        ]
        yield Pair(servers[0], servers[1], router, machines, stack, cluster, database)


@contextmanager
def existing_machine(namespace: Namespace, server: str) -> Iterator[tuple[RawMachine, RawLink]]:
    """A machine that knows a single endpoint and never calls Provision again."""
    machine = RawMachine(api=HostPort(server, 4000), node_uuid=str(uuid.uuid4()), join_token=TOKEN)

    @asynccontextmanager
    async def linked() -> AsyncIterator[RawLink]:
        answer = await machine.provision()
        assert swap_endpoints(answer.server_endpoint)[0] == f"{server}:51820"
        assert set(answer.server_endpoint) == {f"{A}:51820", f"{B}:51820"}
        async with machine.device("raw0", answer) as up:
            with anyio.fail_after(20):
                await up.connected.wait()
            yield up

    with namespace.portal() as portal, portal.wrap_async_context_manager(linked()) as up:
        yield machine, up
