"""What a link learns by ICMPv6 echo requests to the server's overlay address.

Whether the session still carries, where the kernel has no way to renew it but to forget it; and whether packets as large as the
interface takes pass: some paths let handshakes through and lose large datagrams. Only where small ones are answered and no
large one is, the path is at fault; a server that answers no echo says nothing about it.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING

import anyio

from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.hostport import HostPort
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.netlink import call_in
from siderolink.common.wireguard.device import DEFAULT_MTU, DeviceConfig, DeviceEvent, HandshakeCompleted, PeerConfig

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise import Timestamps

import ssl

from siderolink.client.link.signals import ApiBack, ApiLost, Put
from siderolink.common.errors import JoinError
from siderolink.common.grpc import open_channel, translate_errors
from siderolink.common.join_url import JoinURL

ROUNDS = 10
"""With a fifth of all datagrams lost each way, all ten large ones are lost once in thirty thousand times."""
_INTERVAL = 0.5
_SMALL, _LARGE = 16, DEFAULT_MTU - 48
"""Payload bytes: the large one makes an IPv6 packet of 1,280 bytes."""
_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_MARK = 8


async def is_answered(interface: str, server: IPv6Address, namespace: str | None) -> bool:
    """Whether one of two small requests comes back within a second. `namespace` is where the interface is."""
    try:
        probe = _Probe(interface, namespace)
    except OSError:  # this process may open no raw socket
        return False
    with closing(probe):
        for sequence in range(2):
            probe.send(server, sequence, _SMALL)
            with anyio.move_on_after(_INTERVAL):
                await probe.any.wait()
                return True
    return False


async def large_packets_pass(interface: str, server: IPv6Address, namespace: str | None) -> bool | None:
    """True or False; None where it cannot be told. `namespace` is where the interface is."""
    try:
        probe = _Probe(interface, namespace)
    except OSError:
        return None
    with closing(probe):
        for sequence in range(ROUNDS):
            for size in (_SMALL, _LARGE):
                probe.send(server, sequence, size)
            with anyio.move_on_after(_INTERVAL):
                await probe.large.wait()
                return True
    return False if len(probe.small) >= ROUNDS // 3 else None


def _open_socket(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    except BaseException:
        opened.close()
        raise
    return opened


class _Probe:
    """Raises OSError, and ConfigurationError for a namespace that is not there."""

    def __init__(self, interface: str, namespace: str | None) -> None:
        self.any = anyio.Event()
        self.large = anyio.Event()
        self.small: set[bytes] = set()
        self._mark = os.urandom(_MARK)
        self._loop = asyncio.get_running_loop()
        self._socket = call_in(namespace, partial(_open_socket, interface))
        self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def send(self, server: IPv6Address, sequence: int, size: int) -> None:
        name = self._mark[:2]
        # The kernel fills in the checksum (RFC 3542, 3.1).
        packet = bytes((_ECHO_REQUEST, 0, 0, 0)) + name + sequence.to_bytes(2, "big") + self._mark
        try:
            self._socket.sendto(packet.ljust(8 + size, b"\0"), (str(server), 0))
        except OSError:  # the interface is down or gone: somebody else's business
            pass

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(2048)
            except OSError:
                return
            if len(data) >= 8 + _MARK and data[0] == _ECHO_REPLY and data[8 : 8 + _MARK] == self._mark:
                self.any.set()
                if len(data) >= 8 + _LARGE:
                    self.large.set()
                else:
                    self.small.add(data[6:8])


_TIMEOUT = 6.0
"""Seconds a try takes: two initiations."""


async def until_udp_passes(
    key: PrivateKey,
    server_key: Callable[[], PublicKey],
    endpoints: Sequence[HostPort],
    timestamps: "Timestamps",
    backoff: Backoff,
    retry: RetryTrigger,
) -> None:
    """Try now and then, and at once after a retry, until a handshake succeeds with the key that the server has then."""
    while True:
        await retry.sleep(backoff.next())
        for endpoint in endpoints:
            if await _try(key, server_key(), endpoint, timestamps):
                return


async def _try(key: PrivateKey, server_key: PublicKey, endpoint: HostPort, timestamps: "Timestamps") -> bool:
    # Only here, because it needs the data plane, which a kernel device does without.
    from siderolink.common.wireguard.packet_device import open_packet_device

    done = anyio.Event()

    def on_event(event: DeviceEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            done.set()

    config = DeviceConfig(name="UDP probe", private_key=key, listen_port=0, timestamps=timestamps)
    with anyio.move_on_after(_TIMEOUT):
        try:
            address = (await endpoint.resolve())[0]
        except OSError:
            return False
        async with open_packet_device(config, lambda packet: None, on_event) as device:
            await device.set_peer(
                PeerConfig(
                    public_key=server_key,
                    allowed_ips=(IPv6Network("::/0"),),
                    endpoint=address,
                    persistent_keepalive=25,
                )
            )
            await done.wait()
    return done.is_set()


_STABLE = 5.0
"""Seconds after which a connection is one that was kept. Of shorter ones in a row only the first one's end means anything."""
_SPACING = 30.0
"""Seconds from one connection to the next at the least, where each is ended soon although the API answers."""


async def watch_api(url: JoinURL, tls: ssl.SSLContext | None, put: Put, retry: RetryTrigger) -> None:
    """Keep the connection for ever, and tell of its end and of its return."""
    # Not too soon: handshakes find a server that remembers, and it has enough to do in its first seconds.
    backoff = Backoff(first=4.0, cap=30.0, factor=1.5)
    context = (tls or True) if url.tls else None
    is_lost = ends_soon = False
    while True:
        stood_for = 0.0
        try:
            with translate_errors():
                async with open_channel(url.host, url.port, context) as channel:
                    await channel.connect()
                    began_at = anyio.current_time()
                    if is_lost:
                        put(ApiBack())
                    await channel.wait_lost()
                    stood_for = anyio.current_time() - began_at
        except JoinError:
            pass
        if stood_for > _STABLE or (stood_for and not ends_soon):
            put(ApiLost())
            is_lost = True
            ends_soon = stood_for <= _STABLE
            backoff.reset()
        elif stood_for:
            is_lost = False
            await anyio.sleep(_SPACING)
            continue
        await retry.sleep(backoff.next())
