"""Checks of a server: its API, TLS, the token, each endpoint by UDP or the tunnel, and whether full-size packets pass.

A trial machine with its own UUID and key joins, inside this process only: no interface and no privileges are needed. At the end
it asks the server to remove it; a server without support for that keeps it as a machine that is down.
"""

import os
import socket
import ssl
import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv6Network

import anyio

from siderolink.cli.doctor.finding import Finding, bad, good, note
from siderolink.client.link.provisioning import NodeInfo, Provisioned, provision
from siderolink.common.errors import ConfigurationError, JoinRefusedError, SideroLinkError
from siderolink.common.goodbye import GOODBYE_PORT, Goodbye
from siderolink.common.grpc import open_channel
from siderolink.common.grpc.outgoing_proxies import proxy_for
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.tasks import background_tasks
from siderolink.common.transport.choice import Route, choose
from siderolink.common.wireguard.device import DeviceConfig, DeviceEvent, PeerConfig, PeerHandshake
from siderolink.common.wireguard.packet_device import PacketDevice, open_packet_device

__all__ = ["check_server"]

HANDSHAKE_SECONDS = 10.0
ECHO_SECONDS = 3.0
SMALL, FULL = 64, 1280
_GOODBYE_POLLS, _POLLS_PER_GOODBYE, _POLL_SECONDS = 30, 10, 0.05
_IP_MTU, _IPV6_MTU = 14, 24
_ANOTHER_NAME = "the certificate is for another name: use that name in the URL"
_TLS_REMEDIES = {
    9: "set this host's clock: the certificate is not valid yet",
    10: "renew the server's certificate, or set this host's clock",
    62: _ANOTHER_NAME,
    64: _ANOTHER_NAME,  # another IP address
}
"""Remedies by OpenSSL's verify code."""


async def check_server(url: JoinURL, tls: ssl.SSLContext | None) -> AsyncIterator[Finding]:
    """Check everything that a join needs, in order; stops at the first failure."""
    finding = await _check_name(url)
    yield finding
    if finding.is_good is False:
        return
    if url.tls and tls is not None:
        finding = await _check_tls(url, tls)
        yield finding
        if not finding.is_good:
            return
    key = PrivateKey.generate()
    try:
        answer = await provision(url, NodeInfo(uuid=str(uuid.uuid4())), key.public_key(), tls=tls)
    except JoinRefusedError as error:
        remedy = "check the join token" if error.status == "PERMISSION_DENIED" else "see the server's log"
        yield bad("join", str(error), remedy)
        return
    except SideroLinkError as error:
        yield bad(
            "join",
            str(error),
            "check the address, the port, any firewall in between, and that the URL's scheme matches the server",
        )
        return
    yield good("join", f"admitted as {answer.address.ip}")
    working = None
    for route in choose(url, answer, tls).routes:
        async for finding in _check_route(route, answer, key):
            if finding.check == str(route) and finding.is_good:
                working = route
            yield finding
    if working is not None:  # the server removes machines that never completed a handshake
        yield await _leave(working, answer, key)


async def _check_name(url: JoinURL) -> Finding:
    """The server's addresses; behind a proxy, which resolves the server's name itself, those of the proxy."""
    host, port, name = url.host, url.port, "API"
    try:
        proxy = proxy_for(host, port, tls=url.tls, environ=os.environ)
    except ConfigurationError as error:
        return bad("proxy", str(error), "correct the environment variable, or remove it")
    if proxy is not None:
        host, port, name = proxy.host, proxy.port, "proxy"
    try:
        addresses = await HostPort(host, port).resolve()
    except OSError as error:
        return bad(name, f"cannot resolve {host}: {error.strerror or error}", "check the name and this host's DNS")
    found = f"{host} is {', '.join(str(address) for address, _ in addresses)}"
    return good(name, found if proxy is None else f"{url.host} is reached by {proxy}; {found}")


async def _check_tls(url: JoinURL, tls: ssl.SSLContext) -> Finding:
    """Connect as a join does, also through a proxy."""
    try:
        async with open_channel(url.host, url.port, tls) as channel:
            await channel.connect()
        return good("TLS", f"{channel.tls_version}, and the certificate is trusted")
    except ssl.SSLCertVerificationError as error:
        remedy = _TLS_REMEDIES.get(
            error.verify_code, "give the certificate authority with --ca-file, and let the server send its whole chain"
        )
        return bad("TLS", error.verify_message, remedy)
    except (ssl.SSLError, ConnectionResetError, ConnectionAbortedError) as error:
        return bad(
            "TLS", str(error) or "the server ended the connection", "check that the server uses TLS; grpc:// URLs do not"
        )
    except (OSError, SideroLinkError) as error:
        return bad("TLS", str(error), "check the address, the port and any firewall or proxy between")


@dataclass(frozen=True, slots=True)
class _Trial:
    """The trial machine's device, and what it has received."""

    device: PacketDevice
    echoes: set[int]
    """Sizes of the received echo replies."""
    replies: set[bytes]
    """Contents of the received UDP datagrams."""


async def _check_route(route: Route, answer: Provisioned, key: PrivateKey) -> AsyncIterator[Finding]:
    async with _open_trial(route, answer, key) as trial:
        if trial is None:
            is_udp = answer.virtual_address is None
            remedy = "allow UDP to and from that address, or use the tunnel: grpc_tunnel=true in the URL"
            yield bad(str(route), f"no handshake within {HANDSHAKE_SECONDS:g} s", remedy if is_udp else "see the server's log")
            return
        yield good(str(route), "the handshake is answered")
        async for finding in _check_sizes(route, trial, answer):
            yield finding


@asynccontextmanager
async def _open_trial(route: Route, answer: Provisioned, key: PrivateKey) -> AsyncIterator[_Trial | None]:
    """The trial machine's link by this route; None if no handshake is answered."""
    shaken, echoes, replies = anyio.Event(), set[int](), set[bytes]()

    def hear(event: DeviceEvent) -> None:
        if isinstance(event, PeerHandshake):
            shaken.set()

    def receive(packet: bytes) -> None:
        if len(packet) >= 48 and packet[6] == socket.IPPROTO_ICMPV6 and packet[40] == 129:
            echoes.add(len(packet))
        elif len(packet) >= 48 and packet[6] == socket.IPPROTO_UDP and len(replies) < 16:
            replies.add(packet[48:])

    port = None if answer.virtual_address is not None else 0
    config = DeviceConfig(name="doctor", private_key=key, addresses=(answer.address,), listen_port=port)
    peer = PeerConfig(public_key=answer.server_key, allowed_ips=(IPv6Network(answer.server_address),), persistent_keepalive=25)
    async with open_packet_device(config, receive, hear) as device, background_tasks() as tasks:
        tasks.start_soon(route.carry, device, peer, lambda reason: None)
        with anyio.move_on_after(HANDSHAKE_SECONDS):
            await shaken.wait()
        yield _Trial(device, echoes, replies) if shaken.is_set() else None


async def _leave(route: Route, answer: Provisioned, key: PrivateKey) -> Finding:
    """Ask the server to remove the trial machine."""
    goodbye = Goodbye(public_key=key.public_key(), forget=True).encode()
    packet = udp_packet(answer.address.ip.packed, answer.server_address.packed, GOODBYE_PORT, goodbye)
    async with _open_trial(route, answer, key) as trial:
        for attempt in range(_GOODBYE_POLLS if trial is not None else 0):
            assert trial is not None
            if attempt % _POLLS_PER_GOODBYE == 0:
                trial.device.send(packet)
            await anyio.sleep(_POLL_SECONDS)
            if goodbye in trial.replies:
                return good("trial machine", "the server has removed it")
    remedy = f"remove the machine with the key {key.public_key()} there"
    return note("trial machine", "the server still lists it as down", remedy)


async def _check_sizes(route: Route, trial: _Trial, answer: Provisioned) -> AsyncIterator[Finding]:
    name = f"{route}, MTU"
    for size in (SMALL, FULL):
        packet = echo_request(answer.address.ip.packed, answer.server_address.packed, size)
        with anyio.move_on_after(ECHO_SECONDS):
            while size not in trial.echoes:
                trial.device.send(packet)
                await anyio.sleep(0.2)
    if FULL in trial.echoes:
        yield good(name, f"packets of {FULL} bytes pass both ways{_route_mtu(answer)}")
    elif SMALL in trial.echoes:
        remedy = f"the path must carry {FULL + 80} bytes: look for a tunnel or VPN in between, and for dropped ICMP"
        yield bad(name, f"small packets pass, but packets of {FULL} bytes do not{_route_mtu(answer)}", remedy)
    else:
        yield note(name, "the server answers no pings", "links work without pings; its firewall may drop them")


def _route_mtu(answer: Provisioned) -> str:
    """The MTU of this host's route to the first endpoint."""
    if not answer.endpoints:
        return ""
    endpoint = answer.endpoints[0]
    try:
        family, _, _, _, address = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            level, option = (socket.IPPROTO_IP, _IP_MTU) if family == socket.AF_INET else (socket.IPPROTO_IPV6, _IPV6_MTU)
            return f"; this host's route carries {probe.getsockopt(level, option)}"
    except OSError:
        return ""


def echo_request(source: bytes, destination: bytes, size: int) -> bytes:
    """An ICMPv6 echo request (RFC 4443, 4.1) of `size` bytes including its IPv6 header."""
    body = struct.pack("!BBHHH", 128, 0, 0, 1, size & 0xFFFF) + bytes(size - 48)
    return _packet(source, destination, socket.IPPROTO_ICMPV6, body, checksum_at=2)


def udp_packet(source: bytes, destination: bytes, port: int, content: bytes) -> bytes:
    """A UDP datagram from and to `port`, including its IPv6 header."""
    body = struct.pack("!HHHH", port, port, 8 + len(content), 0) + content
    return _packet(source, destination, socket.IPPROTO_UDP, body, checksum_at=6)


def _packet(source: bytes, destination: bytes, protocol: int, body: bytes, checksum_at: int) -> bytes:
    summed = source + destination + struct.pack("!I3xB", len(body), protocol) + body + bytes(len(body) % 2)
    words = sum(struct.unpack(f"!{len(summed) // 2}H", summed))
    while words >> 16:
        words = (words & 0xFFFF) + (words >> 16)
    checksum = struct.pack("!H", (~words & 0xFFFF) or 0xFFFF)
    body = body[:checksum_at] + checksum + body[checksum_at + 2 :]
    return struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + source + destination + body
