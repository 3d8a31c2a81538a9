"""Links, addresses and routes (rtnetlink(7)): parsed, and read one by one or all together.

A message that is too short or names an unknown address family is skipped.
"""

import errno
import socket
import struct
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeVar

from anyio.lowlevel import checkpoint

from siderolink.common.netlink.kinds import KindFacts, parse_kind
from siderolink.common.netlink.messages import Message, attribute, attributes, number, text, values
from siderolink.common.netlink.namespaces import call_in
from siderolink.common.netlink.sockets import NetlinkRefusal, RequestSocket
from siderolink.common.tasks import in_thread

__all__ = [
    *(
        "Address",
        "DELADDR",
        "DELLINK",
        "DELROUTE",
        "GETLINK",
        "GETROUTE",
        "HostNetwork",
        "IPAddress",
        "RTMSG",
        "NetworkLink",
        "NEWADDR",
    ),
    *("NEWLINK", "NEWROUTE", "RTMSG", "NextHop", "Route", "find_link", "link_request"),
    *("parse_address", "parse_link", "parse_route", "read_addresses", "read_link", "read_network"),
]

NEWLINK: Final = 16
DELLINK: Final = 17
GETLINK: Final = 18
NEWADDR: Final = 20
DELADDR: Final = 21
_GETADDR: Final = 22
NEWROUTE: Final = 24
DELROUTE: Final = 25
GETROUTE: Final = 26

MAX_ITEMS: Final = 65_536
"""Maximum number of links, addresses or routes that `read_network` reads; a full Internet routing table has a million."""
_DUMP_ATTEMPTS: Final = 3

_IFINFO: Final = struct.Struct("=BxHiII")
_IFADDR: Final = struct.Struct("=BBBBi")
RTMSG: Final = struct.Struct("=BBBBBBBBI")
_NEXT_HOP: Final = struct.Struct("=HBBi")
_UP, _LOWER_UP = 0x1, 0x10000
_CLONED: Final = 0x200
_NO_STATISTICS: Final = 8

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkLink:
    """An interface. Numbers are the kernel's (linux/if_link.h, linux/if_arp.h)."""

    index: int
    name: str = ""
    type: int = 0
    """ARPHRD: 1 for Ethernet, 772 for the loopback, 65534 for none."""
    flags: int = 0
    mtu: int = 0
    operational_state: int = 0
    """2 for down, 6 for up; a TUN interface has 0, unknown."""
    kind: str = ""
    """The driver's kind, such as ``wireguard`` or ``tun``; empty for hardware."""
    of_kind: KindFacts | None = None
    """The data of this kind of link; None for most."""
    slave_kind: str = ""
    alias: str = ""
    alternative_names: tuple[str, ...] = ()
    queue_discipline: str = ""
    master: int = 0
    parent: int = 0
    """The index of the interface that this one is stacked on."""
    hardware_address: bytes = b""
    permanent_address: bytes = b""
    broadcast_address: bytes = b""
    counters: tuple[int, ...] = field(default=(), compare=False, repr=False)
    """struct rtnl_link_stats64; empty in a dump."""

    @property
    def is_up(self) -> bool:
        """Whether it was set up."""
        return bool(self.flags & _UP)

    @property
    def has_carrier(self) -> bool:
        return bool(self.flags & _LOWER_UP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An interface's address."""

    interface: int
    family: int
    address: IPAddress
    """On a point-to-point interface, the peer's address."""
    prefix_length: int
    local: IPAddress | None
    """The local address; None if the kernel reports none, as for most IPv6 addresses."""
    broadcast: IPAddress | None
    flags: int
    scope: int
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextHop:
    """One next hop of a multipath route."""

    interface: int
    gateway: IPAddress | None
    weight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An entry of a routing table. Numbers are the kernel's (linux/rtnetlink.h)."""

    family: int
    destination: IPNetwork
    """``0.0.0.0/0`` or ``::/0`` for the default."""
    gateway: IPAddress | None
    interface: int
    """The index of the outgoing interface; 0 if there is none or there are several."""
    source: IPAddress | None
    """The preferred source address."""
    table: int
    priority: int
    scope: int
    type: int
    protocol: int
    flags: int
    mtu: int
    next_hops: tuple[NextHop, ...] = ()


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """All links, addresses and routes of a network namespace at one time."""

    links: dict[int, NetworkLink]
    addresses: frozenset[Address] = frozenset()
    routes: frozenset[Route] = frozenset()
    is_complete: bool = True
    """False if there are more than `MAX_ITEMS` of a kind, or they changed during each attempt to read them."""
    read_seconds: float = field(default=0.0, compare=False)
    """Processor time of this thread that reading them took, in seconds."""


# --- parsing


def parse_link(message: Message) -> NetworkLink | None:
    fixed = message.fixed(_IFINFO)
    if fixed is None:
        return None
    _, kind, index, flags, _ = fixed
    found = message.values(_IFINFO.size)
    info = values(found.get(18, b""))
    statistics, name = found.get(23, b""), text(info.get(1, b""))
    return NetworkLink(
        index=index,
        name=text(found.get(3, b"")),
        type=kind,
        flags=flags,
        mtu=number(found.get(4, b"")),
        operational_state=number(found.get(16, b"")),
        kind=name,
        of_kind=parse_kind(name, info.get(2, b"")),
        slave_kind=text(info.get(4, b"")),
        alias=text(found.get(20, b"")),
        alternative_names=tuple(text(found[52][start:end]) for _, start, end in attributes(found.get(52, b""))),
        queue_discipline=text(found.get(6, b"")),
        master=number(found.get(10, b"")),
        parent=number(found.get(5, b"")),
        hardware_address=found.get(1, b""),
        permanent_address=found.get(54, b""),
        broadcast_address=found.get(2, b""),
        counters=struct.unpack_from(f"={len(statistics) // 8}Q", statistics),
    )


def parse_address(message: Message) -> Address | None:
    fixed = message.fixed(_IFADDR)
    if fixed is None:
        return None
    family, prefix_length, flags, scope, index = fixed
    found = message.values(_IFADDR.size)
    address = _ip(family, found.get(1, b"")) or _ip(family, found.get(2, b""))
    if address is None:
        return None
    return Address(
        interface=index,
        family=family,
        address=address,
        prefix_length=prefix_length,
        local=_ip(family, found.get(2, b"")),
        broadcast=_ip(family, found.get(4, b"")),
        flags=number(found[8]) if 8 in found else flags,
        scope=scope,
        label=text(found.get(3, b"")),
    )


def parse_route(message: Message) -> Route | None:
    fixed = message.fixed(RTMSG)
    if fixed is None:
        return None
    family, length, _, _, table, protocol, scope, kind, flags = fixed
    found = message.values(RTMSG.size)
    size = {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family, 0)
    destination = _ip(family, found.get(1, bytes(size)))
    if destination is None or length > 8 * size:
        return None
    return Route(
        family=family,
        destination=ip_network((destination, length), strict=False),
        gateway=_ip(family, found.get(5, b"")) or _via(found.get(18, b"")),
        interface=number(found.get(4, b"")),
        source=_ip(family, found.get(7, b"")),
        table=number(found[15]) if 15 in found else table,
        priority=number(found.get(6, b"")),
        scope=scope,
        type=kind,
        protocol=protocol,
        flags=flags,
        mtu=number(values(found.get(8, b"")).get(2, b"")),
        next_hops=tuple(_next_hops(family, found.get(9, b""))),
    )


def _next_hops(family: int, data: bytes) -> list[NextHop]:
    hops, offset = [], 0
    while offset + _NEXT_HOP.size <= len(data):
        length, _, weight, interface = _NEXT_HOP.unpack_from(data, offset)
        if length < _NEXT_HOP.size or offset + length > len(data):
            break
        found = values(data, offset + _NEXT_HOP.size, offset + length)
        gateway = _ip(family, found.get(5, b"")) or _via(found.get(18, b""))
        hops.append(NextHop(interface=interface, gateway=gateway, weight=weight + 1))
        offset += (length + 3) & ~3
    return hops


def _ip(family: int, value: bytes) -> IPAddress | None:
    if (family == socket.AF_INET and len(value) == 4) or (family == socket.AF_INET6 and len(value) == 16):
        return ip_address(value)
    return None


def _via(value: bytes) -> IPAddress | None:
    """A gateway of another family than the route's own."""
    return _ip(number(value[:2]), value[2:])


# --- reading


def link_request(index: int, *attributes: bytes, flags: int = 0) -> bytes:
    """The payload of a request about one link; with `flags`, which ones are set."""
    return _IFINFO.pack(0, 0, index, flags, flags) + b"".join(attributes)


def read_link(requests: RequestSocket, index: int) -> NetworkLink:
    """The current state of one interface, with its counters. Raises NetlinkRefusal, with ENODEV if there is none."""
    for message in requests.request(GETLINK, link_request(index)):
        link = parse_link(message)
        if link is not None:
            return link
    raise NetlinkRefusal(errno.ENODEV, "no such interface")


def find_link(requests: RequestSocket, name: str) -> NetworkLink:
    """The interface of that name, as `read_link` gives it."""
    for message in requests.request(GETLINK, link_request(0, attribute(3, name.encode() + b"\0"))):
        link = parse_link(message)
        if link is not None:
            return link
    raise NetlinkRefusal(errno.ENODEV, "no such interface")


def read_addresses(requests: RequestSocket, index: int) -> list[Address]:
    """One interface's addresses. Raises NetlinkRefusal."""
    found: list[Address | None] = []
    for part in requests.dump(_GETADDR, bytes(_IFADDR.size)):
        found += map(parse_address, part.messages)
    return [address for address in found if address is not None and address.interface == index]


async def read_network(namespace: str | None = None, *, routes: bool = True) -> HostNetwork:
    """Read everything. Yields to other tasks. Raises NetlinkRefusal, or ConfigurationError for the namespace."""
    with closing(call_in(namespace, RequestSocket)) as requests:
        reader = _Reader(requests)
        links = await reader.dump(GETLINK, link_request(0, attribute(29, _long(_NO_STATISTICS))), parse_link)
        addresses = await reader.dump(_GETADDR, bytes(_IFADDR.size), parse_address)
        entries = await reader.dump(GETROUTE, bytes(RTMSG.size), _parse_entry) if routes else []

    def network() -> HostNetwork:
        by_index = {link.index: link for link in links}
        return HostNetwork(by_index, frozenset(addresses), frozenset(entries), reader.is_complete, reader.seconds)

    return await in_thread(network)  # there may be thousands, and each hash takes microseconds


class _Reader:
    """Reads dumps."""

    def __init__(self, requests: RequestSocket) -> None:
        self._requests = requests
        self.is_complete = True
        self.seconds = 0.0

    async def dump(self, kind: int, payload: bytes, parse: Callable[[Message], T | None]) -> list[T]:
        """The result of a dump, repeated if it changed meanwhile."""
        for _ in range(_DUMP_ATTEMPTS):
            found, is_interrupted = await self._attempt(kind, payload, parse)
            if not is_interrupted:
                break
        self.is_complete &= not is_interrupted and len(found) <= MAX_ITEMS
        return found[:MAX_ITEMS]

    async def _attempt(self, kind: int, payload: bytes, parse: Callable[[Message], T | None]) -> tuple[list[T], bool]:
        found: list[T] = []
        is_interrupted, is_last = False, False
        self._requests.begin_dump(kind, payload)
        while not is_last:  # read to its end even if it is too long: the socket can send a request only then
            began_at = time.thread_time()
            part = self._requests.next_part()
            if len(found) <= MAX_ITEMS:
                found += [item for item in map(parse, part.messages) if item is not None]
            is_interrupted |= part.is_interrupted
            is_last = part.is_last
            self.seconds += time.thread_time() - began_at
            await checkpoint()
        return found, is_interrupted


def _parse_entry(message: Message) -> Route | None:
    route = parse_route(message)
    return None if route is None or route.flags & _CLONED else route  # a cached decision is not an entry


def _long(value: int) -> bytes:
    return struct.pack("=I", value)
