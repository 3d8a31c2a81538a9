"""The life of one link: provision, configure, connect, watch, and begin again where it died.

    provisioning ──► connecting ──► connected ──► re-establishing ──► connected …
                         ▲  next endpoint, then provision again  │
                         └───────────────────────────────────────┘

What counts as up and down is decided in `state`, and how datagrams travel in `common.transport.choice`.
"""

import math
import ssl
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from ipaddress import IPv6Network

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream

from siderolink.client import events
from siderolink.client.provisioning import PROVISION_TIMEOUT, Machine, Provisioned, provision
from siderolink.client.state import ATTEMPT_TIMEOUT, DOWN_AFTER, HandshakeWatch, LinkState
from siderolink.common.addressing import format_peer_addr_port
from siderolink.common.backoff import Backoff
from siderolink.common.errors import JoinError, JoinRefusedError
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.tasks import background_tasks
from siderolink.common.transport.choice import Route, Transport, choose
from siderolink.common.wireguard.device import (
    DEFAULT_MTU,
    Device,
    DeviceConfig,
    DeviceEvent,
    DeviceKind,
    HandshakeCompleted,
    HandshakeGaveUp,
    OnDeviceEvent,
    PeerConfig,
    open_device,
)

KEEPALIVE = 25
"""Seconds between keepalives towards the server."""

OpenDevice = Callable[[DeviceKind, DeviceConfig, OnDeviceEvent], AbstractAsyncContextManager[Device]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """What a link is made from."""

    url: JoinURL
    machine: Machine
    interface: str | None = None
    """The interface's name; None for the transport's usual one."""
    device: DeviceKind = "auto"
    tls: ssl.SSLContext | None = None
    """Takes the place of the system's roots for an https URL."""
    private_key: PrivateKey | None = field(default=None, repr=False)
    """None for a new one."""
    provision_timeout: float = PROVISION_TIMEOUT
    attempt_timeout: float = ATTEMPT_TIMEOUT
    down_after: float = DOWN_AFTER


@dataclass(frozen=True, slots=True)
class _RouteLost:
    reason: str


@dataclass(frozen=True, slots=True)
class _Answered:
    """The server's API was asked again, and this is what it said."""

    answer: Provisioned


_Signal = DeviceEvent | _RouteLost | _Answered


class LinkRunner:
    """Runs a link until cancelled, telling `emit` what happens. Its attributes say how the link stands."""

    def __init__(
        self, options: LinkOptions, emit: Callable[[events.LinkEvent], None], open_device: OpenDevice = open_device
    ) -> None:
        self._options = options
        self._emit = emit
        self._open_device = open_device
        self._key = options.private_key or PrivateKey.generate()
        self._started_at = time.monotonic()
        self._down_at: float | None = None
        # Unix time of the last handshake taken notice of, or of the moment the link went down.
        self._seen_until = time.time()
        self.public_key = self._key.public_key()
        self.state = LinkState.PROVISIONING
        self.answer: Provisioned | None = None
        self.device: Device | None = None
        self.transport: Transport | None = None
        self.route: Route | None = None
        self.answered = anyio.Event()
        """Set once the server has answered a first time."""
        self.connected = anyio.Event()
        """Set once the first handshake is done."""
        self.down = anyio.Event()
        """Set while the link was up and is not now."""

    async def run(self) -> None:
        """Keep the link. Raises a JoinError where the first Provision fails, or a DeviceError; afterwards it tries for ever."""
        try:
            self._emit(events.KeyCreated(public_key=self.public_key))
            answer = await self._provision()
            while True:
                answer = await self._hold(answer)
        finally:
            self.state = LinkState.LEFT
            self.device = None
            self._emit(events.Left())

    async def _provision(self) -> Provisioned:
        options = self._options
        answer = await provision(
            options.url, options.machine, self.public_key, tls=options.tls, timeout=options.provision_timeout
        )
        self._emit(
            events.Joined(
                server_key=answer.server_key,
                address=answer.address,
                server_address=answer.server_address,
                transport=choose(options.url, answer, options.tls).kind,
                endpoints=tuple(str(endpoint) for endpoint in answer.endpoints),
                virtual_address=format_peer_addr_port(*answer.virtual_address) if answer.virtual_address else "",
            )
        )
        return answer

    async def _hold(self, answer: Provisioned) -> Provisioned:
        """Keep one device for as long as the server's answers fit it; returns the first that does not."""
        transport = self._adopt(answer)
        config = DeviceConfig(
            name=self._options.interface or transport.interface,
            private_key=self._key,
            addresses=(answer.address,),
            mtu=DEFAULT_MTU,
            listen_port=transport.listen_port,
        )
        send, receive = anyio.create_memory_object_stream[_Signal](math.inf)
        with send, receive:
            async with self._open_device(self._options.device, config, send.send_nowait) as device:
                self.device = device
                try:
                    return await self._use(device, answer, _Signals(receive, send.send_nowait))
                finally:
                    self.device = None

    async def _use(self, device: Device, answer: Provisioned, signals: "_Signals") -> Provisioned:
        await device.set_peer(_peer(answer, keepalive=0))
        self._emit(events.InterfaceConfigured(interface=device.name, kind=device.kind, mtu=DEFAULT_MTU))
        while True:
            newer = await self._try_routes(device, answer, signals)
            if (newer.address, newer.virtual_address is None) != (answer.address, answer.virtual_address is None):
                return newer
            if newer.server_key != answer.server_key:
                await device.remove_peer(answer.server_key)
            answer = newer
            self._adopt(answer)

    def _adopt(self, answer: Provisioned) -> Transport:
        self.answer = answer
        self.transport = choose(self._options.url, answer, self._options.tls)
        self.answered.set()
        return self.transport

    async def _try_routes(self, device: Device, answer: Provisioned, signals: "_Signals") -> Provisioned:
        """Take the ways to the server in turn, each until it fails; returns the next answer once they are used up."""
        routes = choose(self._options.url, answer, self._options.tls).routes
        peer = _peer(answer, keepalive=KEEPALIVE)
        for index, route in enumerate(routes):
            self.route = route
            self._emit(events.Connecting(route=str(route)))
            if self.state is LinkState.PROVISIONING:
                self.state = LinkState.CONNECTING
            signals.clear()
            async with background_tasks() as tasks:
                tasks.start_soon(self._carry, route, device, peer, signals)
                newer = await self._watch(device, peer, route, signals, last=index == len(routes) - 1)
            if newer is not None:
                return newer
        raise AssertionError("an answer has at least one route")

    async def _carry(self, route: Route, device: Device, peer: PeerConfig, signals: "_Signals") -> None:
        signals.put(_RouteLost(await route.carry(device, peer)))

    async def _watch(
        self, device: Device, peer: PeerConfig, route: Route, signals: "_Signals", *, last: bool
    ) -> Provisioned | None:
        """Watch the link over one route until it is down and, on the last, until there is a newer answer.

        While the server's API is asked, the route is still used: a handshake makes the answer unnecessary.
        """
        while True:
            reason = await self._until_down(device, peer, route, signals)
            self._went_down(route, reason)
            if not last:
                return None
            async with background_tasks() as tasks:
                tasks.start_soon(self._ask_again, signals)
                newer = await signals.until_handshake_or_answer(peer)
            if newer is not None:
                return newer
            self._came_up(route)

    async def _until_down(self, device: Device, peer: PeerConfig, route: Route, signals: "_Signals") -> str:
        watch = HandshakeWatch(
            time.monotonic(), attempt_timeout=self._options.attempt_timeout, down_after=self._options.down_after
        )
        if self.state is LinkState.CONNECTED:
            watch.handshake_completed(time.monotonic())
        while True:
            await self._look(device, peer, route, watch)
            reason = watch.check(time.monotonic())
            if reason is not None:
                return reason
            match await signals.next(watch.deadline):
                case HandshakeCompleted(public_key=key) if key == peer.public_key:
                    self._note_handshake(watch, time.monotonic(), route)
                case HandshakeGaveUp(public_key=key) if key == peer.public_key and watch.is_up:
                    return "handshakes go unanswered"
                case _RouteLost(reason=lost):
                    return lost

    async def _look(self, device: Device, peer: PeerConfig, route: Route, watch: HandshakeWatch) -> None:
        """Ask the device itself, which has the last word where an event was missed."""
        status = await device.peer(peer.public_key)
        if status is not None and status.last_handshake is not None and status.last_handshake > self._seen_until:
            age = max(0.0, time.time() - status.last_handshake)
            self._note_handshake(watch, time.monotonic() - age, route)

    def _note_handshake(self, watch: HandshakeWatch, at: float, route: Route) -> None:
        self._seen_until = time.time()
        self._emit(events.Handshake())
        if watch.handshake_completed(at):
            self._came_up(route)

    def _came_up(self, route: Route) -> None:
        now = time.monotonic()
        self.state = LinkState.CONNECTED
        if not self.connected.is_set():
            self._emit(events.Connected(route=str(route), seconds=now - self._started_at))
            self.connected.set()
        elif self._down_at is not None:
            self._emit(events.Reestablished(route=str(route), down_for=now - self._down_at))
        self._down_at = None
        self.down = anyio.Event() if self.down.is_set() else self.down

    def _went_down(self, route: Route, reason: str) -> None:
        if self.state is LinkState.CONNECTED:
            self.state = LinkState.REESTABLISHING
            self._down_at = time.monotonic()
            self._seen_until = time.time()
            self._emit(events.LinkDown(reason=reason))
            self.down.set()
        else:
            self._emit(events.RouteFailed(route=str(route), reason=reason))

    async def _ask_again(self, signals: "_Signals") -> None:
        backoff = Backoff(first=2.0, cap=60.0)
        refused = Backoff(first=60.0, floor=30.0, cap=300.0)
        while True:
            try:
                signals.put(_Answered(await self._provision()))
                return
            except JoinError as error:
                delay = (refused if isinstance(error, JoinRefusedError) else backoff).next()
                self._emit(events.ProvisionFailed(reason=str(error), retry_in=delay))
            await anyio.sleep(delay)


class _Signals:
    """What the device and the route tell the watching task, in order."""

    def __init__(self, receive: MemoryObjectReceiveStream[_Signal], put: Callable[[_Signal], None]) -> None:
        self._receive = receive
        self.put = put

    def clear(self) -> None:
        """Forget what belongs to an earlier route."""
        while True:
            try:
                self._receive.receive_nowait()
            except anyio.WouldBlock:
                return

    async def next(self, deadline: float) -> _Signal | None:
        """The next one; None at `deadline` (monotonic seconds)."""
        with anyio.move_on_after(max(0.0, deadline - time.monotonic())):
            return await self._receive.receive()
        return None

    async def until_handshake_or_answer(self, peer: PeerConfig) -> Provisioned | None:
        """The newer answer, or None where a handshake with `peer` came first."""
        while True:
            match await self._receive.receive():
                case _Answered(answer=answer):
                    return answer
                case HandshakeCompleted(public_key=key) if key == peer.public_key:
                    return None


def _peer(answer: Provisioned, *, keepalive: int) -> PeerConfig:
    return PeerConfig(
        public_key=answer.server_key,
        allowed_ips=(IPv6Network(answer.server_address),),
        persistent_keepalive=keepalive,
    )
