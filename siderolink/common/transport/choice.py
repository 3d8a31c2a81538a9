"""How a machine's WireGuard datagrams travel to its server: by UDP, or inside a gRPC stream. Chosen here and nowhere else."""

import ssl
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv6Address
from typing import Literal, Protocol

import anyio

from siderolink.common.addressing import format_peer_addr_port
from siderolink.common.backoff import Backoff
from siderolink.common.errors import ServerUnreachableError
from siderolink.common.grpc import GRPCError, Status, open_byte_stream, open_channel, translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.text import one_line
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelPath, carry
from siderolink.common.wireguard.device import Device, PeerConfig

__all__ = ["Answer", "Route", "Transport", "TunnelTransport", "UdpTransport", "choose"]

STREAM_PATH = "/sidero.link.WireGuardOverGRPCService/CreateStream"
STABLE_AFTER = 10.0
"""Seconds: a stream that lived this long is opened again at once."""


class Answer(Protocol):
    """What the choice needs of a server's answer to Provision."""

    @property
    def endpoints(self) -> tuple[HostPort, ...]: ...

    @property
    def virtual_address(self) -> tuple[IPv6Address, int] | None: ...


class Route(Protocol):
    """One way to the server."""

    async def carry(self, device: Device, peer: PeerConfig) -> str:
        """Set the peer up on the device and keep datagrams flowing; returns, with the reason, once this way is of no use."""

    def __str__(self) -> str:
        """The way, for people."""


class Transport(Protocol):
    """One kind of carriage, with what it asks of the device."""

    @property
    def kind(self) -> Literal["udp", "tunnel"]: ...

    @property
    def interface(self) -> str:
        """The interface's usual name: one per kind, so that a change of kind never meets an interface of the other."""

    @property
    def listen_port(self) -> int | None:
        """The device's UDP port: 0 for any, None for none."""

    @property
    def routes(self) -> Sequence[Route]:
        """The ways to the server, to be tried in turn."""


def choose(url: JoinURL, answer: Answer, tls: ssl.SSLContext | None = None) -> Transport:
    """The tunnel where the server answered with a virtual address, asked for or not; else UDP."""
    if answer.virtual_address is not None:
        return TunnelTransport(url, answer.virtual_address, tls)
    return UdpTransport(answer.endpoints)


class UdpTransport:
    """WireGuard as it usually travels."""

    kind: Literal["udp"] = "udp"
    interface = "siderolink"
    listen_port = 0

    def __init__(self, endpoints: Sequence[HostPort]) -> None:
        self.routes: Sequence[Route] = tuple(UdpRoute(endpoint) for endpoint in endpoints)


class UdpRoute:
    """One endpoint; its name is resolved afresh whenever it is tried."""

    def __init__(self, endpoint: HostPort) -> None:
        self._endpoint = endpoint

    async def carry(self, device: Device, peer: PeerConfig) -> str:
        try:
            addresses = await self._endpoint.resolve()
        except OSError as error:
            return f"{self._endpoint.host} cannot be resolved: {error.strerror or error}"
        await _set_peer(device, replace(peer, endpoint=addresses[0]))
        await anyio.sleep_forever()
        raise AssertionError

    def __str__(self) -> str:
        return f"udp {self._endpoint}"


class TunnelTransport:
    """WireGuard inside one gRPC stream on the API's own host; no UDP at all."""

    kind: Literal["tunnel"] = "tunnel"
    interface = "siderolinktun"
    listen_port = None

    def __init__(self, url: JoinURL, virtual_address: tuple[IPv6Address, int], tls: ssl.SSLContext | None = None) -> None:
        self.routes: Sequence[Route] = (TunnelRoute(url, virtual_address, tls),)


class TunnelRoute:
    """The stream, opened again whenever it ends: at once, then after growing delays."""

    def __init__(self, url: JoinURL, virtual_address: tuple[IPv6Address, int], tls: ssl.SSLContext | None) -> None:
        self._url = url
        self._virtual_address = format_peer_addr_port(*virtual_address)
        self._tls = (tls or True) if url.tls else None
        self._backoff = Backoff(first=0.5, cap=10.0, at_once=True)

    async def carry(self, device: Device, peer: PeerConfig) -> str:
        while True:
            opened_at = anyio.current_time()
            try:
                with translate_errors():
                    await self._carry_once(device, peer)
            except ServerUnreachableError:
                pass
            except GRPCError as error:
                if error.status is Status.PERMISSION_DENIED:
                    return f"the server refused the stream: {one_line(error.message or 'no reason given')}"
            if anyio.current_time() - opened_at > STABLE_AFTER:
                self._backoff.reset()
            await anyio.sleep(self._backoff.next())

    async def _carry_once(self, device: Device, peer: PeerConfig) -> None:
        metadata = {ADDRESS_METADATA: self._virtual_address}
        async with (
            open_channel(self._url.host, self._url.port, self._tls) as channel,
            open_byte_stream(channel, STREAM_PATH, metadata) as stream,
        ):
            path = TunnelPath(stream, self._virtual_address)
            await _set_peer(device, peer, path)
            await carry(stream, path, device.deliver)

    def __str__(self) -> str:
        return f"tunnel {self._url.authority}"


async def _set_peer(device: Device, peer: PeerConfig, path: TunnelPath | None = None) -> None:
    # A keepalive that goes from off to on is sent at once: it starts the handshake, or shows a known peer the new path.
    await device.set_peer(replace(peer, persistent_keepalive=0))
    if path is not None:
        device.offer_path(peer.public_key, path)
    await device.set_peer(peer)
