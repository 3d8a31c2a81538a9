"""The origin of a connection or a call: the peer's address, or the client that a trusted proxy names.

A proxy names it in the PROXY protocol's header, version 1 or 2, at the start of the connection; or, for each call, in
``X-Forwarded-For``. Both are trusted only from configured networks.
"""

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from siderolink.common.errors import ConfigurationError
from siderolink.common.hostport import plain_address

Network = IPv4Network | IPv6Network
SocketAddress = tuple[str, int]

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
"""The signature of a version 2 header."""
MAX_HEADER_BYTES = 536
"""Maximum header length of either version; fits in one segment on every path."""
HEADER_SECONDS = 3.0
"""How long a proxy may take to send its header."""
_LONGEST_V1 = 107
_SHORTEST = 15
"""``PROXY UNKNOWN`` and a line end: the shortest header."""
_V1_FAMILIES: dict[bytes, type[IPv4Address] | type[IPv6Address]] = {b"TCP4": IPv4Address, b"TCP6": IPv6Address}
_SO_PEERGROUPS = 59
_MAX_GROUPS = 256
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6, _UNIX_STREAM, _UNSPECIFIED = 0x11, 0x21, 0x31, 0x00


class BadHeaderError(Exception):
    """Raised when a connection does not begin with a valid PROXY protocol header."""


def parse_networks(texts: Iterable[str], option: str) -> tuple[Network, ...]:
    """Parse networks and single addresses. Raises ConfigurationError, which names the option."""
    networks: list[Network] = []
    for text in texts:
        try:
            networks.append(ipaddress.ip_network(text.strip()))
        except ValueError as error:
            raise ConfigurationError(f"{option} takes a network such as 192.0.2.0/24 or 2001:db8::1: {error}") from None
    return tuple(networks)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedProxies:
    """The proxies trusted about clients' addresses."""

    protocol_from: tuple[Network, ...] = ()
    """Networks whose connections begin with a PROXY header. If any are given, other connections are refused."""
    forwarded_from: tuple[Network, ...] = ()
    """Proxies trusted to name a call's client in ``X-Forwarded-For``."""

    def forwarded_for(self, peer: str, fields: Sequence[str]) -> str:
        """The client of a call: the rightmost address that is not a configured proxy's, or else the last proxy's.

        `fields` are the values of the call's ``X-Forwarded-For`` fields, in order. Entries left of one that is not an address
        are not trusted.
        """
        address = peer
        if not self.forwarded_from or not contains(self.forwarded_from, peer):
            return peer
        for entry in reversed(",".join(fields).split(",")):
            found = _forwarded_address(entry)
            if found is None:
                break
            address = found
            if not contains(self.forwarded_from, found):
                break
        return address


def contains(networks: Iterable[Network], address: str) -> bool:
    """Whether a network contains the address; an IPv4-mapped one counts as IPv4."""
    ip = plain_address(address)
    return ip is not None and any(ip.version == network.version and ip in network for network in networks)


@lru_cache(maxsize=4096)
def plain(address: str) -> str:
    """The address without its zone, and as IPv4 if it is IPv4-mapped."""
    return str(plain_address(address) or address)


@dataclass(frozen=True, slots=True)
class LocalPeer:
    """The process at the other end of a local socket when it connected (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    """Its supplementary groups."""


def local_peer(connection: socket.socket) -> LocalPeer | None:
    """The process at the other end of a local socket; None for any other socket."""
    if connection.family != socket.AF_UNIX:
        return None
    pid, uid, gid = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS)
    except OSError:  # older kernels
        raw = b""
    return LocalPeer(pid, uid, gid, struct.unpack(f"{len(raw) // 4}I", raw))


def source_of(address: str, ipv6_bits: int) -> str:
    """The key of a source: an IPv4 address, or an IPv6 prefix."""
    return _source_of(address, ipv6_bits)


@lru_cache(maxsize=4096)
def _source_of(address: str, ipv6_bits: int) -> str:
    ip = plain_address(address)
    if ip is None:
        return ""
    if isinstance(ip, IPv4Address):
        return str(ip)
    return str(IPv6Network((ip, ipv6_bits), strict=False))


@lru_cache(maxsize=4096)
def _forwarded_address(entry: str) -> str | None:
    """The address of one entry, without port and brackets; None if it is invalid."""
    text = entry.strip(" \t")
    if len(text) > 64:
        return None
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not (port.startswith(":") and port[1:].isdecimal())) or ":" not in text:
            return None
    elif text.count(":") == 1:
        text, _, port = text.partition(":")
        if not port.isdecimal():
            return None
    if "%" in text:
        return None
    ip = plain_address(text)
    return None if ip is None else str(ip)


def parse_header(header: bytes) -> SocketAddress | None:
    """The client's address in a complete PROXY header; None for the proxy's own connection or an unknown kind.

    Raises BadHeaderError.
    """
    if header.startswith(SIGNATURE):
        return _parse_v2(header)
    return _parse_v1(header)


def _parse_v1(header: bytes) -> SocketAddress | None:
    if not header.startswith(b"PROXY ") or not header.endswith(b"\r\n") or len(header) > _LONGEST_V1:
        raise BadHeaderError("no PROXY header")
    words = header[:-2].split(b" ")
    if words[1] == b"UNKNOWN":
        return None
    family = _V1_FAMILIES.get(words[1])
    if family is None or len(words) != 6:
        raise BadHeaderError("a PROXY header needs a protocol, two addresses and two ports")
    try:
        source, _ = (str(family(word.decode("ascii"))) for word in words[2:4])
        port, _ = (_port(word) for word in words[4:])
    except ValueError:
        raise BadHeaderError("a PROXY header has an invalid address or port") from None
    if "%" in source:
        raise BadHeaderError("an address in a PROXY header has a zone")
    return source, port


def _port(word: bytes) -> int:
    if not word.isdigit() or len(word) > 5 or (word[:1] == b"0" and word != b"0") or int(word) > 65535:
        raise ValueError
    return int(word)


def _parse_v2(header: bytes) -> SocketAddress | None:
    if len(header) < 16:
        raise BadHeaderError("a PROXY header is cut short")
    command, family, length = struct.unpack_from("!BBH", header, 12)
    if len(header) != 16 + length:
        raise BadHeaderError("a PROXY header whose length does not match its content")
    if command == _LOCAL:
        return None
    if command != _PROXY:
        raise BadHeaderError("a PROXY header of another version or command")
    if family == _TCP4 and length >= 12:
        return str(IPv4Address(header[16:20])), int.from_bytes(header[24:26])
    if family == _TCP6 and length >= 36:
        return str(IPv6Address(header[16:32])), int.from_bytes(header[48:50])
    if family in (_UNIX_STREAM, _UNSPECIFIED):
        return None
    raise BadHeaderError("a PROXY header whose family is not TCP, or which is truncated")


async def read_header(sock: socket.socket) -> SocketAddress | None:
    """Read exactly the PROXY header from a connection. Raises BadHeaderError, TimeoutError or OSError."""
    async with asyncio.timeout(HEADER_SECONDS):
        header = await _read_exactly(sock, _SHORTEST)
        if header.startswith(SIGNATURE):
            header += await _read_exactly(sock, 1)
            length = int.from_bytes(header[14:16])
            if 16 + length > MAX_HEADER_BYTES:
                raise BadHeaderError(f"a PROXY header of more than {MAX_HEADER_BYTES} bytes")
            return parse_header(header + await _read_exactly(sock, length))
        if not header.startswith(b"PROXY "):
            raise BadHeaderError("no PROXY header")
        while not header.endswith(b"\r\n"):
            if len(header) >= _LONGEST_V1:
                raise BadHeaderError("a PROXY header's line has no end")
            # the minimum number of missing bytes
            header += await _read_exactly(sock, 1 if header.endswith(b"\r") else 2)
        return parse_header(header)


async def _read_exactly(sock: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        piece = await loop.sock_recv(sock, size - len(data))
        if not piece:
            raise BadHeaderError("the connection ended within its PROXY header")
        data += piece
    return data
