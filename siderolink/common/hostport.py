"""A host and a port in text form: ``192.0.2.1:51820``, ``[2001:db8::1]:51820``, ``siderolink.example:51820``."""

import asyncio
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Self

from siderolink.common.errors import ConfigurationError, host_error, require_threads

_LONGEST = 253 + 6
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# Resolvers treat a name whose last label is a number as an IPv4 address (RFC 3696, section 2).
_NAME = re.compile(rf"(?=.{{1,253}}\Z)(?!(?:.*\.)?[0-9]+\.?\Z){_LABEL}(?:\.{_LABEL})*\.?\Z")
ZONE = re.compile(r"[A-Za-z0-9._~-]{1,15}")
"""The zone of an IPv6 address (RFC 4007, section 11): an interface's name or number."""


@dataclass(frozen=True, slots=True)
class HostPort:
    """An address to dial or to listen on; `host` is an IP address without brackets, or a name."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, port_zero: bool = False) -> Self:
        """Parse ``host:port``. Raises ConfigurationError. Port 0 is only allowed with `port_zero`."""
        if len(text) > _LONGEST:
            raise ConfigurationError(f"a host and port may have at most {_LONGEST} characters, not {len(text)}")
        host, colon, digits = text.rpartition(":")
        if not colon or not host:
            raise ConfigurationError(f"{text!r} is not host:port")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        if not _is_host(host, ipv6=bracketed):
            raise ConfigurationError(f"{text!r} has no host; write an IPv6 address in brackets")
        if not digits.isascii() or not digits.isdigit() or not (0 if port_zero else 1) <= int(digits) <= 65535:
            raise ConfigurationError(f"{text!r} has no port between 1 and 65535")
        return cls(host, int(digits))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def address(self) -> tuple[IPv4Address | IPv6Address, int] | None:
        """The IP address and port in a form that compares equal for each spelling, without a zone; None for a name."""
        address = plain_address(self.host)
        return None if address is None else (address, self.port)

    async def resolve(self) -> list[tuple[IPv4Address | IPv6Address, int]]:
        """Its present addresses, in the resolver's order. Raises OSError if there are none."""
        try:
            return [(ip_address(self.host), self.port)]
        except ValueError:
            pass
        found = await look_up(self.host, self.port, socket.SOCK_DGRAM, socket.AI_ADDRCONFIG)
        addresses = dict.fromkeys(_zoned(target) for *_, target in found)
        return [(ip_address(address), self.port) for address in addresses]


def _zoned(target: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> str:
    """The address of a socket address, with its zone: link-local ones, such as those of mDNS names, have one."""
    return f"{target[0]}%{target[3]}" if len(target) == 4 and target[3] else str(target[0])


AddressInfo = tuple[
    socket.AddressFamily, socket.SocketKind, int, str, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
]
"""Family, kind, protocol, canonical name and socket address, as in `socket.getaddrinfo`."""
_UV_THREADS = 4
"""Threads that uvloop's libuv starts for its first lookup (libuv, "Thread pool work scheduling")."""
_is_uv_ready = False


def require_lookups() -> None:
    """Raise HostError unless the running loop can look names up: libuv aborts the process if it gets no threads."""
    global _is_uv_ready
    if not _is_uv_ready and type(asyncio.get_running_loop()).__module__.startswith("uvloop"):
        require_threads(_UV_THREADS)
        _is_uv_ready = True


async def look_up(host: str, port: int, kind: socket.SocketKind, flags: int = 0) -> Sequence[AddressInfo]:
    """A host's addresses, in the resolver's order. Raises OSError; HostError if no thread can be started."""
    if plain_address(host) is None:
        require_lookups()
    try:
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=kind, flags=flags)
    except RuntimeError as error:  # asyncio's own lookups run in threads
        raise (host_error(error) or error) from error


def plain_address(text: str) -> IPv4Address | IPv6Address | None:
    """An IP address without its zone, and as IPv4 if it is an IPv4-mapped one; None for other texts."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def is_loopback(host: str) -> bool:
    """Whether it is a loopback address, or the name ``localhost``."""
    return host == "localhost" or is_loopback_address(host)


def is_loopback_address(host: str) -> bool:
    """Whether it is a loopback address, and not a name, which could be resolved to another one."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_host(host: str, *, ipv6: bool) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return not ipv6 and _NAME.match(host) is not None
    _, percent, zone = host.partition("%")
    return (address.version == 6) == ipv6 and (not percent or ZONE.fullmatch(zone) is not None)
