"""A server's admin API without a device, served on a local socket and over TCP with API keys."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from siderolink.common.grpc import GrpcChannel, Limits, Servable, open_channel, serve
from siderolink.common.pb.siderolink.admin.v1 import FleetServer, ServerInfo, ServerStatus
from siderolink.common.tasks import background_tasks
from siderolink.server.admin import Administration
from siderolink.server.admin.forwards import OpenPort
from siderolink.server.admin.services import ADMIN_LIMITS, LocalAccess, RemoteAccess, admin_services, guarded
from siderolink.server.admin.tokens import Tokens
from siderolink.server.events import EventHub, EventStream
from siderolink.server.history import DEFAULT_HISTORY, History
from siderolink.server.reporting import Reports
from siderolink.server.store import Store
from tests.support.fake_device import VirtualClock
from tests.support.manager import Manager


class Facts:
    def __init__(self, hub: EventHub) -> None:
        self._hub = hub

    def events(self) -> EventStream:
        return self._hub.subscribe()

    def info(self) -> ServerInfo:
        return ServerInfo(interface="fake", overlay_address="fdae:41e4:649b:9303::1", api_port=8090)

    def servers(self) -> list[FleetServer]:
        return [FleetServer(is_this=True, state="up", version="1")]

    async def figures(self) -> ServerStatus:
        return ServerStatus()


@dataclass
class AdminServer:
    """See the module."""

    manager: Manager
    administration: Administration
    path: Path
    port: int
    services: list[Servable]
    """Unguarded."""

    @asynccontextmanager
    async def local(self) -> AsyncIterator[GrpcChannel]:
        async with open_channel(path=str(self.path), limits=Limits.for_answers(4 << 20)) as channel:
            yield channel

    @asynccontextmanager
    async def remote(self) -> AsyncIterator[GrpcChannel]:
        async with open_channel("127.0.0.1", self.port) as channel:
            yield channel


@asynccontextmanager
async def open_admin_server(
    folder: Path,
    store: Store | None = None,
    *,
    group: str = "siderolink",
    reports: Reports | None = None,
    time: VirtualClock | None = None,
    relays: Callable[[list[Servable]], list[Servable]] = list,
    open_port: OpenPort | None = None,
) -> AsyncIterator[AdminServer]:
    """Everything but the device is real."""
    manager = Manager(store=store, time=time)
    history = History(manager.store, manager.machines.named, DEFAULT_HISTORY, manager.hub.subscribe())
    administration = Administration(
        manager.store,
        manager.links,
        manager.machines,
        manager.device,
        manager.hub,
        manager.time.clock,
        Tokens(manager.store, manager.join_token),
        lambda machine: None,
        history,
        reports,
        open_port,
        lambda token: f"grpc://api.example.com:443?jointoken={token}",
        lambda machine_id: "server-1",
    )
    services: list[Servable] = admin_services(lambda: administration, lambda: facts)
    facts = Facts(manager.hub)
    path = folder / "admin.sock"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(administration.run(None))
        tasks = await stack.enter_async_context(background_tasks())
        tasks.start_soon(history.run)
        local = guarded(relays(services), LocalAccess(group, lambda: administration, manager.time.clock.sleep))
        await stack.enter_async_context(serve(local, path=path, limits=ADMIN_LIMITS))
        remote = guarded(relays(services), RemoteAccess(lambda: administration, manager.time.clock.sleep))
        server = await stack.enter_async_context(serve(remote, host="127.0.0.1", limits=ADMIN_LIMITS, has_tokens=True))
        yield AdminServer(manager, administration, path, server.port, services)
