"""Probes of a link: echo requests over it, handshakes alongside it, and a connection to the server's API."""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, IPv6Network
from itertools import count
from typing import TYPE_CHECKING

import anyio

from siderolink.client.link.provisioning import MAX_ENDPOINTS
from siderolink.client.link.signals import ApiBack, ApiCutRegularly, ApiLost, Put, ServerDied
from siderolink.client.link.watch import RegularCuts
from siderolink.common.backoff import Backoff, RetryTrigger
from siderolink.common.errors import JoinError
from siderolink.common.grpc import WATCHFUL, open_channel, translate_errors
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.netlink import call_in
from siderolink.common.pb.grpc.health.v1 import HealthCheckResponse
from siderolink.common.tasks import background_tasks
from siderolink.common.transport.choice import Route, UdpRoute
from siderolink.common.wireguard.device import DEFAULT_MTU, DeviceConfig, DeviceEvent, PeerConfig, PeerHandshake

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise import Timestamps
    from siderolink.common.wireguard.packet_device import PacketDevice

log = logging.getLogger("siderolink")

ROUNDS = 10
"""If 20 % of all datagrams are lost each way, all ten large ones are lost once in 30,000 attempts."""
ROUND_SECONDS = 0.5
"""Seconds between echo requests, and so the time limit for each answer."""
SECOND_ECHO_AFTER = 0.1
"""Seconds between the two echo requests that decide whether a link carries packets."""
_SMALL, _LARGE = 16, DEFAULT_MTU - 48
"""Payload bytes: the large one makes an IPv6 packet of 1,280 bytes."""
_ICMPV6, _ECHO_REQUEST, _ECHO_REPLY = 58, 128, 129
_MARK = 8


async def is_answered(interface: str, server: IPv6Address, namespace: str | None, wait: float = ROUND_SECONDS) -> bool:
    """Whether one of two small echo requests is answered within `wait` seconds of the second. `namespace`: the interface's."""
    try:
        probe = _Probe(interface, namespace)
    except OSError:  # this process may not open raw sockets
        return False
    with closing(probe):
        for sequence, seconds in enumerate((SECOND_ECHO_AFTER, wait)):
            probe.send(server, sequence, _SMALL)
            with anyio.move_on_after(seconds):
                await probe.any.wait()
                return True
    return False


async def large_packets_pass(interface: str, server: IPv6Address, namespace: str | None) -> bool | None:
    """Whether the route passes packets as large as the interface's MTU; None if that cannot be determined.

    Some routes pass handshakes but lose large datagrams. The route is at fault only if small requests are answered and no large
    one is; a server that answers no echo proves nothing. `namespace` is where the interface is.
    """
    try:
        probe = _Probe(interface, namespace)
    except OSError:
        return None
    with closing(probe):
        for sequence in range(ROUNDS):
            for size in (_SMALL, _LARGE):
                probe.send(server, sequence, size)
            with anyio.move_on_after(ROUND_SECONDS):
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
    """Raises OSError, or ConfigurationError if the namespace does not exist."""

    def __init__(self, interface: str, namespace: str | None) -> None:
        self.any = anyio.Event()
        self.large = anyio.Event()
        self.small: set[bytes] = set()
        self._mark = os.urandom(_MARK)
        self._loop = asyncio.get_running_loop()
        self._socket = call_in(namespace, partial(_open_socket, interface))
        self._loop.add_reader(self._socket, self._receive_replies)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def send(self, server: IPv6Address, sequence: int, size: int) -> None:
        name = self._mark[:2]
        # The kernel fills in the checksum (RFC 3542, 3.1).
        packet = bytes((_ECHO_REQUEST, 0, 0, 0)) + name + sequence.to_bytes(2, "big") + self._mark
        try:
            self._socket.sendto(packet.ljust(8 + size, b"\0"), (str(server), 0))
        except OSError:  # the interface is down or gone, which the host watch reports
            pass

    def _receive_replies(self) -> None:
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


_HANDSHAKE_INTERVAL = 1.5
_ANSWER_TIMEOUT = 11.5
"""Seconds to wait for an authenticated answer to data: an idle WireGuard peer sends a keepalive after 10 s."""
_ECHO_INTERVAL = 0.5
_RESPONSE_BYTES = 92
"""Size of the message that ends a handshake; larger messages are data."""
_UDP_TIMEOUT = 6.0
"""Seconds for one attempt by UDP: enough for two initiations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeTrial:
    """A handshake with a server in a separate WireGuard engine, without an interface.

    The server then sends to that engine, so any other device with the same key must be silent during the trial and start a
    handshake afterwards.
    """

    key: PrivateKey
    server_key: PublicKey
    timestamps: "Timestamps"
    udp: bool
    """Whether the routes need a UDP socket."""
    timeout: float
    """Seconds for the handshake by one route."""
    echo: tuple[IPv6Address, IPv6Address] | None = None
    """The overlay addresses of machine and server. If given, data must be answered, too: by an echo reply, or by the keepalive
    that every WireGuard implementation sends 10 s after unanswered data."""


async def try_handshake(trial: HandshakeTrial, route: Route) -> str | None:
    """Try one handshake by a route; None if it succeeds, else the reason."""
    # Imported only here: it needs the data plane, which a kernel device does not use.
    from siderolink.common.wireguard.packet_device import open_packet_device

    done = anyio.Event()
    handshakes = 0
    reasons = [f"no handshake by {route} within {trial.timeout:.0f} s"]

    def on_event(event: DeviceEvent) -> None:
        nonlocal handshakes
        if isinstance(event, PeerHandshake):
            handshakes += 1
            done.set()

    config = DeviceConfig(
        name="trial", private_key=trial.key, listen_port=0 if trial.udp else None, timestamps=trial.timestamps
    )
    peer = PeerConfig(public_key=trial.server_key, allowed_ips=(IPv6Network("::/0"),), persistent_keepalive=25)
    with anyio.move_on_after(trial.timeout) as limit:
        async with open_packet_device(config, lambda packet: None, on_event) as device, background_tasks() as tasks:

            async def carry() -> None:
                reasons.append(await route.carry(device, peer, reasons.append))
                done.set()

            async def retry() -> None:
                # Stop after the first handshake: another response would replace the keepalive that answers data.
                await anyio.sleep(_HANDSHAKE_INTERVAL)
                while not done.is_set():
                    await route.shake_hands(device, peer)
                    await anyio.sleep(_HANDSHAKE_INTERVAL)

            tasks.start_soon(carry)
            tasks.start_soon(retry)
            await done.wait()
            if not handshakes:
                return reasons[-1]
            if trial.echo is None:
                return None
            limit.deadline = anyio.current_time() + _ANSWER_TIMEOUT
            reasons.append(f"a handshake succeeded by {route}, but data went unanswered for {_ANSWER_TIMEOUT:.0f} s")
            async for received in _bytes_after_echoes(device, trial.server_key, trial.echo):
                if received > handshakes * _RESPONSE_BYTES:
                    return None
    return reasons[-1]


async def _bytes_after_echoes(
    device: "PacketDevice", server_key: PublicKey, addresses: tuple[IPv6Address, IPv6Address]
) -> AsyncIterator[int]:
    """Send echo requests forever; after each one, yield the number of authenticated bytes received so far."""
    for sequence in count():
        device.send(_echo_request(*addresses, sequence & 0xFFFF))
        await anyio.sleep(min(_ECHO_INTERVAL, 0.05 * 2 ** min(sequence, 8)))
        status = await device.peer(server_key)
        yield status.received_bytes if status is not None else 0


def _echo_request(source: IPv6Address, destination: IPv6Address, sequence: int) -> bytes:
    """A whole IPv6 packet with an ICMPv6 echo request (RFC 4443, 4.1)."""
    body = bytes((_ECHO_REQUEST, 0, 0, 0, 0, 0)) + sequence.to_bytes(2, "big")
    pseudo_header = source.packed + destination.packed + len(body).to_bytes(4, "big") + bytes((0, 0, 0, _ICMPV6))
    words = memoryview(pseudo_header + body)
    total = sum(words[::2]) * 256 + sum(words[1::2])
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + (0xFFFF - total).to_bytes(2, "big") + body[4:]
    return bytes((0x60, 0, 0, 0, 0, len(body), _ICMPV6, 64)) + source.packed + destination.packed + body


async def until_udp_passes(
    key: PrivateKey,
    server_key: Callable[[], PublicKey],
    endpoints: Sequence[HostPort],
    timestamps: "Timestamps",
    backoff: Backoff,
    retry: RetryTrigger,
) -> None:
    """Try handshakes by UDP, at growing intervals and whenever triggered, until one succeeds.

    Meanwhile the link uses the tunnel. After such a handshake the server sends by UDP, so the link must switch back at once.
    """
    while True:
        await retry.sleep(backoff.next())
        trial = HandshakeTrial(key=key, server_key=server_key(), timestamps=timestamps, udp=True, timeout=_UDP_TIMEOUT)
        for endpoint in endpoints:
            if await try_handshake(trial, UdpRoute(endpoint, 0)) is None:
                return


STABLE = 5.0
"""Seconds after which a connection counts as kept. Among consecutive shorter ones, only the end of the first is significant."""
_SPACING = 30.0
"""Minimum seconds between connections when each ends early although the API answers."""
_LEARN_AGAIN = 1800.0
"""Seconds until it is checked again whether a proxy still cuts idle connections."""


async def _until_api_ends(
    url: JoinURL, tls: ssl.SSLContext | bool | None, on_up: Callable[[], None], on_message: Callable[[bytes, bool], bool]
) -> float:
    """Watch the API; returns the number of seconds for which it was reachable.

    `on_message` returns whether there are other servers, so that the loss of this one should be noticed soon.
    """
    began_at: list[float] = []

    def up() -> None:
        began_at.append(anyio.current_time())
        on_up()

    try:
        with translate_errors():
            async with open_channel(url.host, url.port, tls) as channel:

                def heard(message: bytes, is_first: bool) -> None:
                    if on_message(message, is_first):
                        channel.tune(WATCHFUL)

                await channel.watch_health(up, heard)
    except JoinError:
        pass
    except Exception:
        log.exception("watching the server's API failed; retrying")
    return anyio.current_time() - began_at[0] if began_at else 0.0


def _read_endpoints(message: bytes) -> tuple[frozenset[HostPort], frozenset[HostPort]]:
    """The endpoints of the server that sent a health message, and of failed servers; empty if the message contains none."""
    try:
        response = HealthCheckResponse.parse(message)
        own, failed = response.server_endpoints[:MAX_ENDPOINTS], response.failed_endpoints[:MAX_ENDPOINTS]
        return frozenset(map(HostPort.parse, own)), frozenset(map(HostPort.parse, failed))
    except Exception as error:  # another server's message, or a malformed one
        log.debug("a health message names no servers: %s", error)
        return frozenset(), frozenset()


async def watch_api(
    url: JoinURL,
    tls: ssl.SSLContext | None,
    put: Put,
    retry: RetryTrigger,
    on_state: Callable[[bool], None] = lambda is_connected: None,
) -> None:
    """Keep a health call to the server's API open until cancelled. The call ends as soon as the server stops.

    A server without that call is watched by an idle connection. If a proxy cuts idle connections, each cut costs a dial and
    handshakes. After three cuts at the same age, each followed by a successful dial, no connection is kept any more. `on_state`
    is called with True when a connection is open, and with False when it ends.
    """
    # Handshakes detect a server that remembers this machine, which spares a starting server the call.
    backoff = Backoff(first=4.0, cap=30.0, factor=1.5)
    context = (tls or True) if url.tls else None
    is_lost = ends_soon = False
    cuts = RegularCuts()
    here: frozenset[HostPort] = frozenset()

    def api_answers() -> None:
        on_state(True)
        if is_lost:
            put(ApiBack())

    def heard(message: bytes, is_first: bool) -> bool:
        nonlocal here
        here, failed = _read_endpoints(message)
        if failed or not is_first:
            put(ServerDied(failed))
        return bool(here)

    while True:
        here = frozenset()
        try:
            stood_for = await _until_api_ends(url, context, api_answers, heard)
        finally:
            on_state(False)
        if not stood_for:
            cuts = RegularCuts()
        elif (age := cuts.note(stood_for)) is not None:
            put(ApiCutRegularly(age))
            is_lost = False
            await anyio.sleep(_LEARN_AGAIN)
            continue
        if stood_for > STABLE or (stood_for and not ends_soon):
            put(ApiLost(here))
            is_lost = True
            ends_soon = stood_for <= STABLE
            backoff.reset()
        elif stood_for:
            is_lost = False
            await anyio.sleep(_SPACING)
            continue
        await retry.sleep(backoff.next())
