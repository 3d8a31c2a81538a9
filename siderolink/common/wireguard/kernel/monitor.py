"""Follows the kernel's interface by netlink: up, down, its MTU, its end."""

import asyncio
import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from siderolink.common.readers import read_on
from siderolink.common.wireguard.kernel.attributes import attributes
from siderolink.common.wireguard.kernel.netlink import ROUTE, Message, Netlink, NetlinkRefusal

__all__ = ["LinkMonitor", "LinkState", "open_events", "read_link"]

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_LINK_GROUP: Final = 1
_UP: Final = 1
_IFINFO: Final = struct.Struct("=BxHiII")
_HEAD: Final = struct.Struct("=IHHII")
_MTU, _STATS = 4, 23
_RECEIVE_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class LinkState:
    """The interface as netlink describes it."""

    is_up: bool
    mtu: int
    counters: tuple[int, ...] = ()
    """struct rtnl_link_stats64."""


def read_link(netlink: Netlink, index: int) -> LinkState:
    """The interface as it is now. Raises NetlinkRefusal, with ENODEV where it is gone."""
    for message in netlink.request(_GETLINK, _IFINFO.pack(0, 0, index, 0, 0)):
        return _parse(message)
    raise NetlinkRefusal(errno.ENODEV, "no such interface")


def _parse(message: Message) -> LinkState:
    _, _, _, flags, _ = _IFINFO.unpack_from(message.data, message.start)
    mtu, counters = 0, ()
    for kind, start, end in attributes(message.data, message.start + _IFINFO.size, message.end):
        if kind == _MTU:
            mtu = int.from_bytes(message.data[start:end], "little")
        elif kind == _STATS:
            counters = struct.unpack_from(f"={(end - start) // 8}Q", message.data, start)
    return LinkState(bool(flags & _UP), mtu, counters)


class LinkMonitor:
    """Calls `on_change` with what of the interface changed, and `on_lost` once when it is gone from this namespace.

    Where the kernel had to drop messages for us (ENOBUFS), the state is asked for anew, so that none is missed.
    """

    def __init__(
        self, index: int, sock: socket.socket, on_change: Callable[[LinkState], None], on_lost: Callable[[], None]
    ) -> None:
        """`sock` comes from `open_events` and is closed with the monitor; `index` is the interface's in its namespace."""
        self._index = index
        self._socket = sock
        self._on_change = on_change
        self._on_lost = on_lost
        self._last: tuple[bool, int] | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)

    def close(self) -> None:
        """Does nothing the second time."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _read(self) -> None:
        was_overrun = False
        while self._socket.fileno() >= 0:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: messages were lost
                was_overrun = True
                read_on(self._loop, self._socket, self._read)
                continue
            self._take(data)
        if was_overrun and self._socket.fileno() >= 0:
            self._ask()  # only now is there room for the answer

    def _ask(self) -> None:
        """Have the kernel tell the state once more; the answer comes by the same socket, an error if there is no interface."""
        request = _IFINFO.pack(0, 0, self._index, 0, 0)
        try:
            self._socket.send(_HEAD.pack(_HEAD.size + len(request), _GETLINK, 1, 0, 0) + request)
        except OSError:
            self._loop.call_later(1.0, self._ask_again)

    def _ask_again(self) -> None:
        if self._socket.fileno() >= 0:
            self._ask()

    def _take(self, data: bytes) -> None:
        offset = 0
        while offset + _HEAD.size <= len(data):
            length, kind, *_ = _HEAD.unpack_from(data, offset)
            if length < _HEAD.size or offset + length > len(data):
                return
            message = Message(kind, data, offset + _HEAD.size, offset + length)
            if kind == 2:  # the answer to `_ask`
                self._lose()
            elif kind in (_NEWLINK, _DELLINK) and _IFINFO.unpack_from(data, message.start)[2] == self._index:
                if kind == _DELLINK:
                    self._lose()
                else:
                    self._tell(_parse(message))
            offset += (length + 3) & ~3

    def _tell(self, state: LinkState) -> None:
        if (state.is_up, state.mtu) != self._last:
            self._last = (state.is_up, state.mtu)
            self._on_change(state)

    def _lose(self) -> None:
        if self._socket.fileno() >= 0:
            self.close()
            self._on_lost()


def open_events() -> socket.socket:
    """A socket that hears of the links in the calling thread's network namespace."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, ROUTE)
    opened.bind((0, _LINK_GROUP))
    return opened
