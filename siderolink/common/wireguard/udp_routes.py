"""From where answers leave: the local address and the interface that packets came to, as long as that is a way to the sender.

A machine may have several addresses and several ways out, and who wrote to one of them waits for an answer from there. When the
address goes, or another route takes over from the one that was in use, the routing table decides afresh. The kernel tells of
such changes by netlink (rtnetlink(7)), and is asked for its choice at the next send: nothing polls, idle peers cost nothing.
"""

import asyncio
import socket
from typing import Final

from siderolink.common.netlink import EventSocket, NetlinkRefusal, RouteLookup, open_events
from siderolink.common.netlink.follow import ADDRESSES, ROUTES

__all__ = ["Control", "Pin", "Routes"]

Control = tuple[int, int, bytes]
"""A control message for sendmsg."""

_IP_PKTINFO: Final = 8
_RULES: Final = 0x80 | 0x40000
"""RTMGRP_IPV4_RULE, and of IPv6 the same."""
NO_WAY: Final = 0
"""There is no route; interfaces count from 1."""


class Routes:
    """The routing table of the network namespace in which this is made."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises OSError where there is no netlink."""
        self.generation = 0
        """Rises whenever something may have changed."""
        self._lookup = RouteLookup()
        try:
            opened = open_events(ADDRESSES | ROUTES | _RULES)
        except OSError:
            self._lookup.close()
            raise
        self._events = EventSocket(opened, lambda messages: self.forget(), self.forget)

    def close(self) -> None:
        """Does nothing the second time."""
        self._events.close()
        self._lookup.close()

    def forget(self) -> None:
        """Something changed on which the way out depends."""
        self.generation += 1

    def way(self, destination: bytes, source: bytes, mark: int, interface: int = 0) -> int | None:
        """The interface by which packets would leave, or NO_WAY; None if the kernel did not say.

        Addresses are of 4 or 16 bytes. `interface`: look only for routes by that one.
        """
        try:
            route = self._lookup.find(destination, source=source, mark=mark, interface=interface)
        except NetlinkRefusal:
            return None
        return NO_WAY if route is None else route.interface


class Pin:
    """The local end of a path: what makes packets leave from where the other side's came to."""

    __slots__ = ("_checked", "_destination", "_interface", "_is_forced", "_kept", "_source", "_way", "control")

    def __init__(self, destination: bytes, source: bytes, interface: int) -> None:
        """`source` is the local address, `interface` the one that packets came by."""
        self._destination = destination
        self._source = source
        self._interface = interface
        self._kept = _control(source, interface if _is_link_local(source) else 0)
        self._is_forced = False
        """The routing table alone would send by another interface."""
        self._checked = -1
        self._way: int | None = None
        self.control: Control | None = self._kept
        """For sendmsg; None leaves the choice to the routing table."""

    def check(self, routes: Routes, mark: int) -> Control | None:
        """The control message, after another look at the routing table if that has changed."""
        if self._checked != routes.generation:
            is_first, self._checked = self._checked < 0, routes.generation
            if not (_is_link_local(self._source) or _is_link_local(self._destination)):
                self._look(routes, mark, is_first)
        return self.control

    def _look(self, routes: Routes, mark: int, is_first: bool) -> None:
        before, way = self._way, routes.way(self._destination, self._source, mark)
        if way is None:
            return
        self._way = way
        if way == self._interface:
            self.control = self._kept
        elif not is_first and way != before:  # another route goes before the one that was in use
            self.control = None
        elif is_first or self._is_forced:
            by_interface = routes.way(self._destination, self._source, mark, self._interface)
            self._is_forced = by_interface == self._interface
            self.control = _control(self._source, self._interface) if self._is_forced else self._kept


def _control(source: bytes, interface: int) -> Control:
    index = interface.to_bytes(4, "little")
    if len(source) == 4:
        return socket.IPPROTO_IP, _IP_PKTINFO, index + source + bytes(4)
    return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source + index


def _is_link_local(address: bytes) -> bool:
    """Such an address is none without its interface."""
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80
