"""The machine's maintenance API and its listeners.

Without SideroLink, the API listens on all addresses. With SideroLink configured, it listens only on the overlay address, for
packets by the SideroLink interface and for local processes; as long as there is no such address, it does not listen.
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address

import anyio

from siderolink.client.maintenance.actions import MachineActions
from siderolink.client.maintenance.certificate import RENEW_AFTER, MaintenanceCertificates
from siderolink.client.maintenance.dispatch import CallCounter, MethodTable
from siderolink.client.maintenance.history import EventHistory, LogBuffer
from siderolink.client.maintenance.hooks import MachineHooks
from siderolink.client.maintenance.observation import Observation
from siderolink.client.maintenance.resources.host import keep_host_resources
from siderolink.client.maintenance.resources.store import ResourceStore
from siderolink.client.maintenance.roles import Admittance
from siderolink.client.maintenance.state_service import StateService
from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import GrpcServer, Limits, Servable, serve
from siderolink.common.overlay_socket import bind_overlay
from siderolink.common.tasks import background_tasks

log = logging.getLogger("siderolink")

API_PORT = 50000
ANSWER_SECONDS = 5.0
"""The API waits this long for running calls before it moves to another address."""
RETRY_SECONDS = 2.0
LIMITS = Limits(
    max_message_bytes=1024 * 1024,
    stream_window_bytes=1024 * 1024 + 5,
    connection_window_bytes=2 * 1024 * 1024,
    max_connections=64,
    max_connections_per_address=32,
    max_streams=64,
)


@dataclass(frozen=True, slots=True)
class Everywhere:
    """On every address of the host: no SideroLink is configured."""


@dataclass(frozen=True, slots=True)
class Nowhere:
    """On no address: SideroLink is configured, and there is no overlay address yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnOverlay:
    """On the overlay address only."""

    address: IPv6Address
    interface: str
    server: IPv6Address
    """The server's overlay address; a caller from it on that interface is the admin."""
    interface_index: int = 0
    """The interface's index, 0 if unknown: an interface that is recreated under the same name has another index."""


Place = Everywhere | Nowhere | OnOverlay


class MaintenanceApi:
    """A running API; setting `place` moves it. Created by `serve_maintenance`."""

    def __init__(self, hooks: MachineHooks, resources: ResourceStore, port: int, place: Place, limits: Limits) -> None:
        self.resources = resources
        """The resources that the API serves; an embedder may add its own."""
        self.refusals: Counter[str] = Counter()
        """Refused connections and calls by reason (docs/drops.md)."""
        self.events = EventHistory()
        """The events that `MachineService/Events` serves; an embedder may publish its own."""
        self.log = LogBuffer()
        """The log that `MachineService/Logs` serves."""
        self._implementations = (
            Observation(hooks, self.events, self.log).implementations() | MachineActions(hooks).implementations()
        )
        self._port = port
        self._limits = limits
        self._certificates = MaintenanceCertificates()
        self._wanted: Place = place
        self._moved = anyio.Event()
        self._listening = anyio.Event()
        self._tried = anyio.Event()
        self._idle = anyio.Event()
        self._calls = CallCounter(lambda: self._idle.set())
        self._servers: list[GrpcServer] = []

    @property
    def place(self) -> Place:
        """Where the API should listen."""
        return self._wanted

    @property
    def port(self) -> int | None:
        """The TCP port, or None while the API is not listening."""
        return self._servers[0].port if self._servers else None

    def move(self, place: Place) -> None:
        """Listen at `place` only. Running calls are answered first, because one of them may have caused the move."""
        if place == self._wanted:
            return
        self._wanted = place
        self._listening = anyio.Event()
        self._moved.set()

    async def wait_listening(self) -> None:
        """Wait until the API listens at `place`, or has closed its sockets if `place` is none."""
        await self._listening.wait()

    async def wait_tried(self) -> None:
        """Wait for the first attempt to listen, successful or not."""
        await self._tried.wait()

    async def run(self) -> None:
        """Listen at `place` and follow its changes. Never returns."""
        async with background_tasks() as renewing:
            renewing.start_soon(self._renew)
            while True:
                self._moved = anyio.Event()
                async with background_tasks() as tasks:
                    tasks.start_soon(self._listen, self._wanted, self._listening)
                    await self._moved.wait()
                    await self._until_answered()

    async def _until_answered(self) -> None:
        with anyio.move_on_after(ANSWER_SECONDS):
            while self._calls.count:
                self._idle = anyio.Event()
                await self._idle.wait()

    async def _listen(self, place: Place, listening: anyio.Event) -> None:
        """Listen at one place until cancelled, and retry after failures."""
        while True:
            try:
                async with AsyncExitStack() as stack:
                    await self._open(stack, place)
                    listening.set()
                    self._tried.set()
                    await anyio.sleep_forever()
            except SideroLinkError as error:
                log.warning("the maintenance API cannot listen; retrying: %s", error)
            self._tried.set()
            await anyio.sleep(RETRY_SECONDS)

    async def _open(self, stack: AsyncExitStack, place: Place) -> None:
        match place:
            case Everywhere():
                await stack.enter_async_context(self._serve(Admittance(readers_apply=True), host=None))
            case OnOverlay(address=address, interface=interface, server=server):
                sock = await bind_overlay(address, self._port, interface)
                await stack.enter_async_context(
                    self._serve(Admittance(admin=server), listening=[sock], reserved_for=[str(server)])
                )
                # The machine's own processes reach the overlay address over the loopback interface.
                local = await bind_overlay(address, self._servers[0].port, "lo")
                await stack.enter_async_context(self._serve(Admittance(), listening=[local]))
            case Nowhere():
                pass

    @asynccontextmanager
    async def _serve(self, admittance: Admittance, **where: object) -> AsyncIterator[None]:
        methods = MethodTable(self._implementations, admittance, self._calls)
        services: list[Servable] = [methods, StateService(self.resources, admittance)]
        try:
            async with serve(
                services,
                port=self._port,
                tls=self._certificates.context,
                limits=self._limits,
                on_refusal=lambda refusal, _: self.refusals.update([str(refusal)]),
                **where,  # type: ignore[arg-type]
            ) as server:
                self._servers.append(server)
                try:
                    yield
                finally:
                    self._servers.remove(server)
        finally:
            with anyio.CancelScope(shield=True):
                await methods.finish()

    async def _renew(self) -> None:
        while True:
            await anyio.sleep(RENEW_AFTER.total_seconds())
            self._certificates.renew()


@asynccontextmanager
async def serve_maintenance(
    hooks: MachineHooks | None = None,
    *,
    node_uuid: str,
    place: Place | None = None,
    port: int = API_PORT,
    resources: ResourceStore | None = None,
    limits: Limits = LIMITS,
) -> AsyncIterator[MaintenanceApi]:
    """Serve the machine's API until the context ends, starting at `place` (everywhere by default).

    Failures to listen, such as a port in use, are logged and retried. The resources that describe the host are kept up to date.
    """
    store = ResourceStore() if resources is None else resources
    hooks = hooks or MachineHooks()
    api = MaintenanceApi(hooks, store, port, place or Everywhere(), limits)
    keep = partial(keep_host_resources, store, node_uuid=node_uuid, tag=hooks.version.tag, platform=hooks.version.platform)
    log.addHandler(api.log)
    try:
        async with background_tasks() as tasks:
            await tasks.start(keep)
            tasks.start_soon(api.run)
            await api.wait_tried()
            yield api
    finally:
        log.removeHandler(api.log)
