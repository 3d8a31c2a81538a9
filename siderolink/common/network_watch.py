"""What changes on this host's network, told by the kernel over netlink (rtnetlink(7)): nothing is polled.

A raw socket on the event loop, whichever that is. Only what is needed is read of each message: its kind, its interface, and
whether an interface has got its carrier. What happens within a moment is told together.
"""

import asyncio
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from siderolink.common.netlink import call_in
from siderolink.common.readers import read_on
from siderolink.common.wireguard.kernel.attributes import attribute, attributes

_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _NEWROUTE, _DELROUTE, _GETROUTE = 16, 17, 20, 21, 24, 25, 26
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""
_LOWER_UP: Final = 0x10000
_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
_ADDRESS: Final = struct.Struct("=BBBBI")
_ROUTE: Final = struct.Struct("=BB6xI")
_DESTINATION, _OUTGOING_INTERFACE, _SOURCE = 1, 4, 7
_REQUEST: Final = 1
_RECEIVE_BYTES: Final = 1 << 16
_MOMENT: Final = 0.05
_MAX_INTERFACES: Final = 4096


@dataclass(frozen=True, slots=True)
class NetworkChange:
    """What changed within one moment."""

    interfaces: frozenset[int]
    """The indexes of the interfaces concerned."""
    carriers: frozenset[int]
    """Those of them that had lost their carrier and have it again."""
    lost: bool = False
    """Some messages were lost: anything may have changed."""


@dataclass(frozen=True, slots=True)
class WayOut:
    """How packets to an address leave this host."""

    source: bytes
    """The local address; empty where the kernel names none."""
    interface: int
    """The index of the interface."""


class NetworkWatch:
    """Follows one network namespace: that of the thread that makes it, or the one that is named."""

    def __init__(self, on_change: Callable[[NetworkChange], None], namespace: str | None = None) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._carriers: dict[int, bool] = {}
        self._changed: set[int] = set()
        self._new_carriers: set[int] = set()
        self._lost = False
        self._timer: asyncio.TimerHandle | None = None
        self._socket = call_in(namespace, _open_socket)
        self._socket.bind((0, _GROUPS))
        self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        """Does nothing the second time."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()
        if self._timer is not None:
            self._timer.cancel()

    def _read(self) -> None:
        for _ in range(64):
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: the kernel had more to say than there was room for
                self._lost = True
                read_on(self._loop, self._socket, self._read)
                continue
            for kind, body in _messages(data):
                self._take(kind, body)
        if (self._changed or self._lost) and self._timer is None:
            self._timer = self._loop.call_later(_MOMENT, self._tell)

    def _take(self, kind: int, body: bytes) -> None:
        if kind in (_NEWLINK, _DELLINK) and len(body) >= _LINK.size:
            _, _, index, flags, _ = _LINK.unpack_from(body)
            has_carrier = kind == _NEWLINK and bool(flags & _LOWER_UP)
            if has_carrier and not self._carriers.get(index, True):
                self._new_carriers.add(index)
            if kind == _DELLINK or (index not in self._carriers and len(self._carriers) >= _MAX_INTERFACES):
                self._carriers.pop(index, None)
            else:
                self._carriers[index] = has_carrier
            self._changed.add(index)
        elif kind in (_NEWADDR, _DELADDR) and len(body) >= _ADDRESS.size:
            self._changed.add(_ADDRESS.unpack_from(body)[4])
        elif kind in (_NEWROUTE, _DELROUTE):
            self._changed.add(_outgoing(body))

    def _tell(self) -> None:
        self._timer = None
        change = NetworkChange(frozenset(self._changed), frozenset(self._new_carriers), self._lost)
        self._changed.clear()
        self._new_carriers.clear()
        self._lost = False
        self._on_change(change)


def _open_socket() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)


def way_out(remote: str) -> WayOut | None:
    """How packets to this numeric address would leave; None where there is no route."""
    try:
        family, _, _, _, target = socket.getaddrinfo(remote, 9, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0]
        address = socket.inet_pton(family, str(target[0]).partition("%")[0])
        body = _ROUTE.pack(family, 8 * len(address), 0) + attribute(_DESTINATION, address)
        if len(target) == 4 and target[3]:
            body += attribute(_OUTGOING_INTERFACE, struct.pack("=I", target[3]))
        with _open_socket() as asking:
            asking.send(_HEADER.pack(_HEADER.size + len(body), _GETROUTE, _REQUEST, 1, 0) + body)
            answer = asking.recv(_RECEIVE_BYTES)
    except OSError:
        return None
    for kind, route in _messages(answer):
        if kind == _NEWROUTE:
            return WayOut(_attribute(route, _SOURCE), _outgoing(route))
    return None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _outgoing(route: bytes) -> int:
    """The interface of a route; 0 where it names none, or several."""
    return int.from_bytes(_attribute(route, _OUTGOING_INTERFACE), sys.byteorder)


def _attribute(route: bytes, wanted: int) -> bytes:
    """The value of a route's attribute, empty where there is none."""
    return next((route[start:end] for kind, start, end in attributes(route, _ROUTE.size) if kind == wanted), b"")
