"""Chooses the transport of a machine's WireGuard datagrams: UDP or a gRPC stream. No other module does."""

import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Literal, Protocol

import anyio

from siderolink.common.addressing import format_peer_addr_port
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.errors import ConfigurationError, JoinError
from siderolink.common.grpc import WATCHFUL, ByteStream, GRPCError, Status, open_byte_stream, open_channel, translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.tasks import background_tasks
from siderolink.common.text import one_line
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelPath, carry
from siderolink.common.wireguard.device import CanShakeHands, Device, PeerConfig, dial_peer

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from siderolink.common.wireguard.path import Endpoint

__all__ = ["Answer", "LinkTransport", "OnInterrupted", "Route", "TunnelTransport", "UdpTransport", "choose"]

STABLE_AFTER = 10.0
"""Seconds; a stream that lasted this long is reopened immediately."""
_MOVE_SECONDS, _MOVE_POLL_SECONDS = 2.0, 0.005
_MOVE_ATTEMPTS = 7
"""Attempts to open a stream to another server, within about 20 s, because balancers detect a draining server with a delay."""
_UNDER_WAY_SECONDS = 1.0
"""Seconds for which an old stream is still read after another one has taken over."""


OnInterrupted = Callable[[str], None]
"""Called with the reason when a route is interrupted. It recovers by itself; the next handshake shows that."""


class Answer(Protocol):
    """The part of a Provision answer that determines the transport."""

    @property
    def endpoints(self) -> tuple[HostPort, ...]: ...

    @property
    def virtual_address(self) -> tuple[IPv6Address, int] | None: ...


class Route(Protocol):
    """One route to the server."""

    @property
    def remote(self) -> str | None:
        """The address (as text) to which this host sends on this route; None if unknown."""

    @property
    def endpoint(self) -> HostPort | None:
        """The server's endpoint by UDP, as its answer lists it; None for a stream."""

    async def carry(self, device: Device, peer: PeerConfig, on_interrupted: OnInterrupted) -> str:
        """Configure the peer on the device, start a handshake, and forward datagrams.

        Returns the reason once this route no longer works.
        """

    async def shake_hands(self, device: Device, peer: PeerConfig) -> None:
        """Start a handshake on this route. Does nothing while the route is interrupted."""

    async def shake_hands_with(self, device: Device, peer: PeerConfig, endpoints: Sequence[HostPort]) -> bool:
        """Start a handshake with the first of the peer's other endpoints, while the session stays in use on this route.

        Returns after a short time whether it was answered. Does nothing if the device or the route does not support it.
        """

    def reopen(self) -> None:
        """Replace the open stream, if any, because it may be dead."""

    def __str__(self) -> str:
        """The route, for display."""


class LinkTransport(Protocol):
    """A transport: its routes, and its requirements of the device."""

    @property
    def kind(self) -> Literal["udp", "tunnel"]: ...

    @property
    def interface(self) -> str:
        """The interface's default name: one per transport, so that a switch never finds an interface of the other kind."""

    @property
    def listen_port(self) -> int | None:
        """The device's UDP port: 0 for any, None for none."""

    @property
    def routes(self) -> Sequence[Route]:
        """The routes to the server, to be tried in turn."""


def choose(
    url: JoinURL,
    answer: Answer,
    tls: ssl.SSLContext | None = None,
    *,
    retry: RetryTrigger | None = None,
    turn: int = 0,
) -> LinkTransport:
    """Choose the tunnel if the server answered with a virtual address, whether or not it was requested; otherwise UDP.

    `retry` ends waits between attempts. Each `turn` uses another one of the addresses of a host name.
    """
    if answer.virtual_address is not None:
        return TunnelTransport(url, answer.virtual_address, tls, retry or RetryTrigger())
    return UdpTransport(answer.endpoints, turn)


class UdpTransport:
    """Plain WireGuard over UDP."""

    kind: Literal["udp"] = "udp"
    interface = "siderolink"
    listen_port = 0

    def __init__(self, endpoints: Sequence[HostPort], turn: int = 0) -> None:
        self.routes: Sequence[Route] = tuple(UdpRoute(endpoint, turn) for endpoint in endpoints)


class UdpRoute:
    """One endpoint, whose name is resolved again for each attempt."""

    def __init__(self, endpoint: HostPort, turn: int) -> None:
        self.endpoint = endpoint
        self._turn = turn
        self._address: Endpoint | None = None

    @property
    def remote(self) -> str | None:
        return str(self._address[0]) if self._address is not None else None

    async def carry(self, device: Device, peer: PeerConfig, on_interrupted: OnInterrupted) -> str:
        try:
            addresses = await self.endpoint.resolve()
        except OSError as error:
            return f"cannot resolve {self.endpoint.host}: {error.strerror or error}"
        self._address = addresses[self._turn % len(addresses)]
        try:
            await dial_peer(device, replace(peer, endpoint=self._address))
        except ConfigurationError as error:
            return str(error)
        await anyio.sleep_forever()
        raise AssertionError

    async def shake_hands(self, device: Device, peer: PeerConfig) -> None:
        if isinstance(device, CanShakeHands):
            await device.handshake(peer.public_key)
        elif self._address is not None:
            await dial_peer(device, replace(peer, endpoint=self._address))

    async def shake_hands_with(self, device: Device, peer: PeerConfig, endpoints: Sequence[HostPort]) -> bool:
        if not isinstance(device, CanShakeHands) or self._address is None or not endpoints:
            return False
        try:
            there = (await endpoints[0].resolve())[0]
            before = await device.peer(peer.public_key)
            # No other task runs in between, so only the initiation is sent there. Its answer moves the path.
            await device.set_peer(replace(peer, endpoint=there))
        except (OSError, ConfigurationError):  # it cannot be dialled from here
            return False
        await device.handshake(peer.public_key)
        await device.set_peer(replace(peer, endpoint=self._address))
        with anyio.move_on_after(_MOVE_SECONDS):
            while before is not None:
                await anyio.sleep(_MOVE_POLL_SECONDS)
                now = await device.peer(peer.public_key)
                if now is None or now.last_handshake != before.last_handshake:
                    return now is not None
        return False

    def reopen(self) -> None:
        """Does nothing: there is no stream."""

    def __str__(self) -> str:
        return f"udp {self.endpoint}"


class TunnelTransport:
    """WireGuard inside one gRPC stream on the API's host, without UDP."""

    kind: Literal["tunnel"] = "tunnel"
    interface = "siderolinktun"
    listen_port = None

    def __init__(
        self, url: JoinURL, virtual_address: tuple[IPv6Address, int], tls: ssl.SSLContext | None, retry: RetryTrigger
    ) -> None:
        self.routes: Sequence[Route] = (TunnelRoute(url, virtual_address, tls, retry),)


class TunnelRoute:
    """The stream, reopened whenever it ends: first immediately, then with backoff."""

    endpoint = None

    def __init__(
        self, url: JoinURL, virtual_address: tuple[IPv6Address, int], tls: ssl.SSLContext | None, retry: RetryTrigger
    ) -> None:
        self._url = url
        self._virtual_address = format_peer_addr_port(*virtual_address)
        self._tls = (tls or True) if url.tls else None
        self._backoff = Backoff(first=0.5, cap=10.0, at_once=True, factor=1.5)
        self._retry = retry
        self._path: TunnelPath | None = None
        self._attempt: anyio.CancelScope | None = None
        self._tasks: TaskGroup | None = None
        self._next: _StreamBeside | None = None
        """The stream that takes over when the present one ends."""
        self.remote: str | None = None

    async def carry(self, device: Device, peer: PeerConfig, on_interrupted: OnInterrupted) -> str:
        try:
            async with background_tasks() as self._tasks:
                return await self._keep_carrying(device, peer, on_interrupted)
        finally:
            self._tasks = self._next = None

    async def _keep_carrying(self, device: Device, peer: PeerConfig, on_interrupted: OnInterrupted) -> str:
        while True:
            opened_at = anyio.current_time()
            reason = "it is being reopened"
            try:
                with anyio.CancelScope() as self._attempt, translate_errors():
                    await self._carry_once(device, peer)
                    reason = "the server ended it"
            except JoinError as error:
                reason = str(error)
            except GRPCError as error:
                if error.status is Status.PERMISSION_DENIED:
                    return f"the server refused the stream: {one_line(error.message or 'no reason given')}"
                reason = one_line(error.message or error.status.name)
            if self._next is not None and await self._next.takes_over():
                continue
            on_interrupted(f"the tunnel's stream was cut: {reason}")
            if anyio.current_time() - opened_at > STABLE_AFTER:
                self._backoff.reset()
            await self._retry.sleep(self._backoff.next())

    async def _carry_once(self, device: Device, peer: PeerConfig) -> None:
        beside, self._next = self._next, None
        try:
            if beside is not None and beside.path is not None:
                self._path, self.remote = beside.path, beside.remote
                device.offer_path(peer.public_key, beside.path)
                await beside.until_ended()
                return
            async with self._opened() as (stream, path):
                self.remote = _host(stream)
                await dial_peer(device, peer, path)
                self._path = path
                await carry(stream, path, device.deliver)
        finally:
            self._path = None

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[tuple[ByteStream, TunnelPath]]:
        metadata = {ADDRESS_METADATA: self._virtual_address}
        async with (
            open_channel(self._url.host, self._url.port, self._tls, limits=WATCHFUL) as channel,
            open_byte_stream(channel, metadata=metadata) as stream,
        ):
            yield stream, TunnelPath(stream, self._virtual_address)

    async def shake_hands(self, device: Device, peer: PeerConfig) -> None:
        if self._path is None:
            return
        if isinstance(device, CanShakeHands):
            await device.handshake(peer.public_key)
        else:
            await dial_peer(device, peer, self._path)

    async def shake_hands_with(self, device: Device, peer: PeerConfig, endpoints: Sequence[HostPort]) -> bool:
        """Try a second stream to wherever the API's address leads now; it replaces the first one once it is answered.

        The first one stays in use while the second is refused, silent or cut; further ones are tried with backoff.
        """
        if not isinstance(device, CanShakeHands):
            self.reopen()
            return False
        backoff = Backoff(first=0.5, cap=8.0)
        for attempt in range(_MOVE_ATTEMPTS):
            if attempt:
                await self._retry.sleep(backoff.next())
            if self._tasks is None or self._path is None:
                return False  # a stream is already being opened
            if await self._move(self._tasks, device, peer):
                return True
        return False

    async def _move(self, tasks: "TaskGroup", device: Device, peer: PeerConfig) -> bool:
        """Whether a second stream was answered and now carries the link."""
        attempt, beside = self._attempt, _StreamBeside()
        self._next = beside
        try:
            tasks.start_soon(beside.carry, self._opened, device)
            with anyio.move_on_after(_MOVE_SECONDS):
                await beside.shake_hands(device, peer)
        finally:
            beside.decide()
            if not beside.is_answered and self._next is beside:
                self._next = None
        if beside.is_answered:
            await anyio.sleep(_UNDER_WAY_SECONDS)
            if attempt is not None and self._next is beside:
                attempt.cancel()
        return beside.is_answered

    def reopen(self) -> None:
        """Reopen the stream immediately."""
        self._backoff.reset()
        if self._attempt is not None:
            self._attempt.cancel()

    def __str__(self) -> str:
        return f"tunnel {self._url.authority}"


_Opened = AbstractAsyncContextManager[tuple[ByteStream, TunnelPath]]


class _StreamBeside:
    """A second stream of a link, from its first handshake on."""

    def __init__(self) -> None:
        self.path: TunnelPath | None = None
        self.remote: str | None = None
        self.is_answered = False
        self._scope = anyio.CancelScope()
        self._opened = anyio.Event()
        self._decided = anyio.Event()
        self._ended = anyio.Event()
        self._error: GRPCError | JoinError | None = None

    async def carry(self, opened: Callable[[], _Opened], device: Device) -> None:
        """Open it and forward its datagrams until it ends. Waiters receive its error."""
        try:
            with self._scope, translate_errors():
                async with opened() as (stream, path):
                    self.path, self.remote = path, _host(stream)
                    self._opened.set()
                    await carry(stream, path, device.deliver)
        except (GRPCError, JoinError) as error:
            self._error = error
        finally:
            self._opened.set()
            self._ended.set()

    async def shake_hands(self, device: Device, peer: PeerConfig) -> None:
        """Start a handshake on it; returns once that is answered, or the stream has ended."""
        await self._opened.wait()
        if self.path is None or not isinstance(device, CanShakeHands):
            return
        await device.handshake(peer.public_key, self.path)
        while not self._ended.is_set() and not self.is_answered:
            await anyio.sleep(_MOVE_POLL_SECONDS)
            self.is_answered = device.sends_by(peer.public_key, self.path)

    def decide(self) -> None:
        """Settle whether it was answered in time."""
        if not self.is_answered:
            self._scope.cancel()
        self._decided.set()

    async def takes_over(self) -> bool:
        await self._decided.wait()
        return self.is_answered

    async def until_ended(self) -> None:
        """Wait for its end; ends it if the caller is cancelled. Raises GRPCError, JoinError."""
        try:
            await self._ended.wait()
        finally:
            self._scope.cancel()
        if self._error is not None:
            raise self._error


def _host(stream: ByteStream) -> str | None:
    """The address to which this host sends."""
    return stream.peer_name.rpartition(":")[0] or None
