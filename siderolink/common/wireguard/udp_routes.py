"""The source address and interface of replies: those that the peer's packets were sent to, while they still lead to the peer.

A machine may have several addresses and several routes, and a peer expects the reply from the address it wrote to. When that
address disappears, or a better route replaces the one in use, the routing table decides again. The kernel announces such
changes by netlink (rtnetlink(7)), and the next send repeats the lookup: nothing polls, and idle peers cost nothing.
"""

import asyncio
import socket
import struct
import sys
from functools import lru_cache
from typing import Final

from siderolink.common.netlink import EventSocket, NetlinkRefusal, RouteLookup, open_events
from siderolink.common.netlink.follow import ADDRESSES, ROUTES

__all__ = ["Control", "LocalEnd", "Routes", "SocketAddress", "encode_address", "encode_control"]

Control = tuple[int, int, bytes]
"""A control message for sendmsg."""

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
"""As in the socket module: host, port, and for IPv6 flow information and scope id."""

_CONTROL_HEADER: Final = struct.Struct("@Nii")
_IP_PKTINFO: Final = 8
_RULES: Final = 0x80 | 0x40000
"""RTMGRP_IPV4_RULE, and the same for IPv6."""
NO_ROUTE: Final = 0
"""No route; interface indexes begin at 1."""


class Routes:
    """Looks up routes in the network namespace in which this is created."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises OSError without netlink."""
        self.generation = 0
        """Increases whenever a lookup's result may have changed."""
        self._lookup = RouteLookup()
        try:
            opened = open_events(ADDRESSES | ROUTES | _RULES)
        except OSError:
            self._lookup.close()
            raise
        self._events = EventSocket(opened, lambda messages: self.invalidate(), self.invalidate)

    def close(self) -> None:
        """Idempotent."""
        self._events.close()
        self._lookup.close()

    def invalidate(self) -> None:
        """Note a change that may affect routing."""
        self.generation += 1

    def outgoing(self, destination: bytes, source: bytes, mark: int, interface: int = 0) -> int | None:
        """The outgoing interface, or NO_ROUTE; None if the kernel did not answer.

        Addresses have 4 or 16 bytes. `interface`: consider only routes through this one.
        """
        try:
            route = self._lookup.find(destination, source=source, mark=mark, interface=interface)
        except NetlinkRefusal:
            return None
        return NO_ROUTE if route is None else route.interface


class LocalEnd:
    """The local end of a path: sends replies from the address and interface to which the peer's packets were sent."""

    __slots__ = ("_destination", "_interface", "_is_forced", "_kept", "_outgoing", "_source", "checked", "control")

    def __init__(self, destination: bytes, source: bytes, interface: int) -> None:
        """`source` is the local address, `interface` the one on which packets arrived."""
        self._destination = destination
        self._source = source
        self._interface = interface
        self._kept = _control(source, interface if _is_link_local(source) else 0)
        self._is_forced = False
        """Whether the routing table alone would choose another interface."""
        self.checked = -1
        """The generation of the routes at the last lookup."""
        self._outgoing: int | None = None
        self.control: Control | None = self._kept
        """For sendmsg; None leaves the choice to the routing table."""

    def check(self, routes: Routes, mark: int) -> Control | None:
        """The control message; repeats the lookup if routing has changed."""
        if self.checked != routes.generation:
            is_first, self.checked = self.checked < 0, routes.generation
            if not (_is_link_local(self._source) or _is_link_local(self._destination)):
                self._query(routes, mark, is_first)
        return self.control

    def _query(self, routes: Routes, mark: int, is_first: bool) -> None:
        before, outgoing = self._outgoing, routes.outgoing(self._destination, self._source, mark)
        if outgoing is None:
            return
        self._outgoing = outgoing
        if outgoing == self._interface:
            self.control = self._kept
        elif not is_first and outgoing != before:  # a better route has replaced the one in use
            self.control = None
        elif is_first or self._is_forced:
            by_interface = routes.outgoing(self._destination, self._source, mark, self._interface)
            self._is_forced = by_interface == self._interface
            self.control = _control(self._source, self._interface) if self._is_forced else self._kept


@lru_cache(maxsize=64)
def _control(source: bytes, interface: int) -> Control:
    """Most paths share their local end."""
    index = interface.to_bytes(4, "little")
    if len(source) == 4:
        return socket.IPPROTO_IP, _IP_PKTINFO, index + source + bytes(4)
    return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source + index


def _is_link_local(address: bytes) -> bool:
    """Such an address is meaningless without its interface."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


def encode_address(address: SocketAddress, source: bytes) -> bytes:
    """Encode sockaddr_in or sockaddr_in6; `source` is the IP address and the port in two bytes."""
    if len(address) == 2:
        return socket.AF_INET.to_bytes(2, sys.byteorder) + source[-2:] + source[:-2] + bytes(8)
    family = socket.AF_INET6.to_bytes(2, sys.byteorder)
    _, _, flow, zone = address
    return family + source[-2:] + flow.to_bytes(4, "big") + source[:-2] + zone.to_bytes(4, sys.byteorder)


@lru_cache(maxsize=64)
def encode_control(control: Control) -> bytes:
    """Encode cmsghdr and data (cmsg(3))."""
    level, kind, data = control
    header = _CONTROL_HEADER.pack(socket.CMSG_LEN(len(data)), level, kind)
    return (header + data).ljust(socket.CMSG_SPACE(len(data)), b"\0")
