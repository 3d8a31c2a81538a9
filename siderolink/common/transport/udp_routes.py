"""From where answers leave: the local address and the interface that packets came to, as long as that is a way to the sender.

A machine may have several addresses and several ways out, and who wrote to one of them waits for an answer from there. When the
address goes, or another route takes over from the one that was in use, the routing table decides afresh. The kernel tells of
such changes by netlink (rtnetlink(7)), and is asked for its choice at the next send: nothing polls, idle peers cost nothing.
"""

import asyncio
import errno
import socket
import struct
from typing import Final

from siderolink.common.readers import read_on
from siderolink.common.wireguard.kernel.attributes import attribute, attributes

__all__ = ["Control", "Pin", "Routes"]

Control = tuple[int, int, bytes]
"""A control message for sendmsg."""

_IP_PKTINFO: Final = 8
_HEADER: Final = struct.Struct("=IHHII")
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
_NEWROUTE, _GETROUTE = 24, 26
_REQUEST: Final = 0x1
_FIB_MATCH: Final = 0x2000
"""Answer with the table's entry, or an error: without one, Linux takes any IPv4 host for a neighbour on a named interface."""
_DESTINATION, _SOURCE, _INTERFACE, _MARK = 1, 2, 4, 16
_GROUPS: Final = 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000
"""RTMGRP_IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, and of IPv6 the rules."""
_RECEIVE_BYTES: Final = 1 << 15
_MOST_NEWS: Final = 100
"""Times in one second that changes are taken note of at once; more come every `_MOMENT`."""
_MOMENT: Final = 0.1
NO_WAY: Final = 0
"""There is no route; interfaces count from 1."""


class Routes:
    """The routing table of the network namespace in which this is made."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Raises OSError where there is no netlink."""
        self.generation = 0
        """Rises whenever something may have changed."""
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._second = loop.time()
        self._heard = 0
        self._news = _netlink(_GROUPS)
        try:
            self._questions = _netlink(0)
        except OSError:
            self._news.close()
            raise
        loop.add_reader(self._news, self._changed)

    def close(self) -> None:
        """Does nothing the second time."""
        if self._news.fileno() >= 0:
            self._loop.remove_reader(self._news)
            self._news.close()
            self._questions.close()
        if self._timer is not None:
            self._timer.cancel()

    def forget(self) -> None:
        """Something else changed on which the way out depends."""
        self.generation += 1

    def way(self, destination: bytes, source: bytes, mark: int, interface: int = 0) -> int | None:
        """The interface by which packets would leave, or NO_WAY; None if the kernel did not say.

        Addresses are of 4 or 16 bytes. `interface`: look only for routes by that one.
        """
        family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
        bits = len(destination) * 8
        flags = _FIB_MATCH if interface and family == socket.AF_INET else 0
        body = _ROUTE.pack(family, bits, bits, 0, 0, 0, 0, 0, flags)
        body += attribute(_DESTINATION, destination) + attribute(_SOURCE, source)
        for kind, number in ((_MARK, mark), (_INTERFACE, interface)):
            if number:
                body += attribute(kind, number.to_bytes(4, "little"))
        try:
            self._questions.send(_HEADER.pack(_HEADER.size + len(body), _GETROUTE, _REQUEST, 0, 0) + body)
            return _outgoing(self._questions.recv(_RECEIVE_BYTES))
        except OSError:
            return None

    def _changed(self) -> None:
        self.generation += 1
        for _ in range(64):
            try:
                self._news.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: the kernel had more to say than there was room for
                read_on(self._loop, self._news, self._changed)
                continue
        now = self._loop.time()
        if now - self._second > 1.0:
            self._second, self._heard = now, 0
        self._heard += 1
        if self._heard > _MOST_NEWS:
            self._loop.remove_reader(self._news)
            self._timer = self._loop.call_later(_MOMENT, self._listen)

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._news, self._changed)


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


def _netlink(groups: int) -> socket.socket:
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    try:
        made.bind((0, groups))
    except OSError:
        made.close()
        raise
    return made


def _outgoing(data: bytes) -> int | None:
    """The interface that an answer names."""
    if len(data) < _HEADER.size + 4:
        return None
    _, kind, _, _, _ = _HEADER.unpack_from(data)
    if kind != _NEWROUTE:
        number = -int.from_bytes(data[_HEADER.size : _HEADER.size + 4], "little", signed=True)
        return None if number in (errno.EPERM, errno.ENOBUFS, errno.ENOMEM) else NO_WAY
    for name, start, end in attributes(data, _HEADER.size + _ROUTE.size):
        if name == _INTERFACE and end - start == 4:
            return int.from_bytes(data[start:end], "little")
    return NO_WAY
