"""One simulated machine: real Provision calls and real WireGuard datagrams, no interface. It only answers pings."""

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable
from ipaddress import IPv6Network

from siderolink.client.link.provisioning import NodeInfo, Provisioned, provision
from siderolink.common.errors import SideroLinkError
from siderolink.common.grpc import GRPCError, open_byte_stream, open_channel, translate_errors
from siderolink.common.hostport import look_up
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.transport.tunnel import ADDRESS_METADATA, TunnelPath, carry
from siderolink.common.wireguard.noise import Engine, Peer, SessionEstablished
from siderolink.common.wireguard.noise import Path as EnginePath
from siderolink.common.wireguard.packets import MatrixCiphers
from siderolink.common.wireguard.path import Datagrams

KEEPALIVE_SECONDS = 25
_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_RETRY_SECONDS = 1.0
_CIPHERS = MatrixCiphers()
"""Shared by all machines: each batch is processed before the next begins."""


class SocketPath:
    """A UDP socket and its destination. Not connected, so that closed ports cause no errors."""

    headroom = 0
    batch_bytes = spare_bytes = 1 << 16
    peer = None
    source = b""
    is_open = True
    is_writable = True

    def __init__(self, sock: socket.socket, endpoint: tuple[object, ...]) -> None:
        self._sock = sock
        self.endpoint = endpoint

    def send(self, datagrams: Datagrams) -> None:
        with contextlib.suppress(OSError):  # no route, or the buffer is full: the same as a lost packet
            self._sock.sendto(datagrams.data, self.endpoint)


class SimulatedMachine:
    """A machine and its link; `on_up` is called with the seconds that each connect took."""

    def __init__(self, url: JoinURL, *, tunnel: bool, source: str | None, on_up: Callable[[float], None]) -> None:
        """`source` is the local address to send datagrams from; None uses the routing table."""
        self._url = JoinURL(url.host, url.port, tls=url.tls, join_token=url.join_token, tunnel=tunnel)
        self._identity = NodeInfo(uuid=str(uuid.uuid4()), unique_token=os.urandom(16).hex(), version="v1.13.0")
        self._source = source
        self._on_up = on_up
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sock: socket.socket | None = None
        self._carrying: asyncio.Task[None] | None = None
        self._asked_at: float | None = None
        self._peer: Peer | None = None
        """The server, once joined."""
        self.is_up = False
        """Whether a handshake has completed since the last connect began."""

    async def join(self) -> None:
        """Call Provision with a new key. Raises SideroLinkError."""
        key = PrivateKey.generate()
        self._engine = Engine(bytes(key), entropy=os.urandom, unix_time_ns=time.time_ns, ciphers=_CIPHERS)
        self._answer: Provisioned = await provision(self._url, self._identity, key.public_key())
        self._peer = self._engine.add_peer(bytes(self._answer.server_key))
        self._engine.allowed_ips.set(self._peer, [_host(self._answer)])

    async def connect(self) -> None:
        """Connect by the transport selected in the server's response. Raises OSError."""
        self._asked_at, self.is_up = self._loop.time(), False
        if self._answer.virtual_address is not None:
            self._carrying = self._loop.create_task(self._carry())
            return
        family, endpoint = await self._resolve()
        self._sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        any_address = "0.0.0.0" if family == socket.AF_INET else "::"
        self._sock.bind((self._source or any_address, 0))
        self._loop.add_reader(self._sock, self._receive_datagrams)
        self._set_out(SocketPath(self._sock, endpoint))

    def reconnect(self) -> None:
        """Drop the session and start a new handshake, as after a lost link. Does nothing before the machine has joined."""
        if self._peer is None:
            return
        self._asked_at, self.is_up = self._loop.time(), False
        path = self._peer.path
        self._engine.stop()
        self._peer.last_initiation_sent_at = float("-inf")
        self._engine.start(_now())
        if path is not None:
            self._set_out(path)

    async def close(self) -> None:
        """Disappear without a goodbye."""
        if self._timer is not None:
            self._timer.cancel()
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._sock.close()
        if self._carrying is not None:
            self._carrying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._carrying

    def _set_out(self, path: EnginePath) -> None:
        assert self._peer is not None
        now = _now()
        self._peer.path = path
        self._engine.set_persistent_keepalive(self._peer, 0, now)
        self._engine.set_persistent_keepalive(self._peer, KEEPALIVE_SECONDS, now)
        self._drain(now)

    async def _resolve(self) -> tuple[int, tuple[object, ...]]:
        endpoint = self._answer.endpoints[0]
        found = await look_up(endpoint.host, endpoint.port, socket.SOCK_DGRAM)
        return found[0][0], found[0][4]

    async def _carry(self) -> None:
        """Run one stream until cancelled."""
        assert self._answer.virtual_address is not None
        address, port = self._answer.virtual_address
        metadata = {ADDRESS_METADATA: f"[{address}]:{port}"}
        while True:
            with contextlib.suppress(SideroLinkError, GRPCError):
                with translate_errors():
                    async with (
                        open_channel(self._url.host, self._url.port, self._url.tls) as channel,
                        open_byte_stream(channel, metadata=metadata) as stream,
                    ):
                        path = TunnelPath(stream, "server")
                        self._set_out(path)
                        await carry(stream, path, self._deliver)
            await asyncio.sleep(_RETRY_SECONDS)

    def _receive_datagrams(self) -> None:
        assert self._sock is not None
        assert self._peer is not None
        try:
            datagram, endpoint = self._sock.recvfrom(1 << 16)
        except OSError:
            return
        path = self._peer.path
        if not isinstance(path, SocketPath) or path.endpoint != endpoint:
            path = SocketPath(self._sock, endpoint)  # another server dials; the engine goes there if the packet is authentic
        self._deliver(Datagrams.single(datagram), path)

    def _deliver(self, datagrams: Datagrams, path: EnginePath) -> None:
        for index in range(datagrams.count):
            self._receive(datagrams, index, path)

    def _receive(self, datagrams: Datagrams, index: int, path: EnginePath) -> None:
        now = _now()
        received = self._engine.receive(datagrams, path, now, first=index)
        for packet in received[1].packets(received[0]) if received is not None else ():
            reply = echo_reply(packet)
            if reply is not None:
                self._engine.send(reply, now)
        self._drain(now)

    def _drain(self, now: float) -> None:
        for peer in self._engine.output.take_ready():
            peer.take_staged()
        for path, datagram in self._engine.output.take_datagrams():
            way: SocketPath | TunnelPath = path  # type: ignore[assignment] # it has no others
            way.send(Datagrams.single(datagram, way.headroom))
        for event in self._engine.output.take_events():
            if isinstance(event, SessionEstablished) and self._asked_at is not None:
                took, self._asked_at, self.is_up = self._loop.time() - self._asked_at, None, True
                self._on_up(took)
        if self._timer is not None:
            self._timer.cancel()
        at = self._engine.next_deadline()
        self._timer = self._loop.call_later(max(0.0, at - now), self._due) if at != float("inf") else None

    def _due(self) -> None:
        self._timer = None
        now = _now()
        self._engine.handle_timers(now)
        self._drain(now)


def echo_reply(packet: bytes) -> bytes | None:
    """The reply to an ICMPv6 echo request (RFC 4443, 4.2); None for any other packet."""
    if len(packet) < 48 or packet[6] != 58 or packet[40] != _ECHO_REQUEST:
        return None
    reply = bytearray(packet)
    reply[8:24], reply[24:40] = packet[24:40], packet[8:24]
    reply[40] = _ECHO_REPLY
    checksum = int.from_bytes(packet[42:44]) - 0x0100  # the type is greater by one, so the checksum is less by one
    reply[42:44] = (checksum if checksum >= 0 else checksum + 0xFFFF).to_bytes(2)
    return bytes(reply)


def _host(answer: Provisioned) -> IPv6Network:
    return IPv6Network((int(answer.server_address), 128))


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)
