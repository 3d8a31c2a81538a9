"""Follows a TUN interface by netlink, also into another network namespace.

A netlink socket reports on the namespace in which it was opened. When the interface is moved, the monitor opens a new socket
there; the device's UDP sockets stay where they are, as WireGuard users expect. The interface's state is requested each time,
because it may have changed, or moved on, before the socket was open.
"""

import fcntl
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Final

from pyroute2 import netns

from siderolink.common.netlink import InterfaceMonitor, NetworkLink, RequestSocket, call_in, open_events, read_link
from siderolink.common.netlink.follow import LINKS
from siderolink.common.netlink.messages import attribute

__all__ = ["TunMonitor"]

_TUNGETDEVNETNS: Final = 0x54E3
_TUNGETIFF: Final = 0x800454D2
_IFREQ_BYTES: Final = 40
_GSO_MAX_SIZE: Final = 41
_MOVES: Final = 10
"""Attempts to follow an interface that is moved repeatedly."""


class TunMonitor:
    """Calls `on_change` when the interface is set up or down or gets another MTU or name.

    Reading the interface shows its deletion.
    """

    def __init__(self, tun_fd: int, on_change: Callable[[NetworkLink], None], namespace: str | None = None) -> None:
        """`namespace` is the interface's, if not the calling thread's. Raises OSError or ConfigurationError."""
        self._tun_fd = tun_fd
        self._on_change = on_change
        self._last: tuple[bool, int, str] | None = None
        self._start(call_in(namespace, partial(_open_for, tun_fd)))

    def _start(self, opened: "_Opened") -> None:
        self._index, self._requests = opened.index, opened.requests
        self._monitor = InterfaceMonitor(opened.events, opened.index, self._changed, self._follow)
        self._monitor.request_state()

    def close(self) -> None:
        self._monitor.close()
        self._requests.close()

    def read(self) -> NetworkLink | None:
        """The current interface with its counters; None once it is gone."""
        try:
            return read_link(self._requests, self._index)
        except OSError:
            return None

    def counters(self) -> tuple[int, ...]:
        """struct rtnl_link_stats64 of the interface; empty once it is gone."""
        link = self.read()
        return () if link is None else link.counters

    def limit_gso(self, size: int) -> None:
        """Cap the size of the interface's super-packets; Linux before 5.19 has no such setting and ignores it."""
        self._monitor.set(attribute(_GSO_MAX_SIZE, size.to_bytes(4, "little")))

    def _changed(self, link: NetworkLink) -> None:
        state = link.is_up, link.mtu, link.name
        if state != self._last:
            self._last = state
            self._on_change(link)

    def _follow(self) -> None:
        """Listen in the namespace that the interface moved to."""
        for _ in range(_MOVES):
            try:
                namespace = fcntl.ioctl(self._tun_fd, _TUNGETDEVNETNS)
            except OSError:  # deleted
                return
            try:
                with ThreadPoolExecutor(1) as thread:  # a network namespace is a property of the thread
                    opened = thread.submit(_open_in, namespace, self._tun_fd).result()
            except OSError:  # it has moved again
                continue
            finally:
                os.close(namespace)
            self._requests.close()
            self._start(opened)
            return


@dataclass(frozen=True, slots=True)
class _Opened:
    """The sockets open in the interface's namespace."""

    events: socket.socket
    requests: RequestSocket
    index: int


def _open_in(namespace: int, tun_fd: int) -> _Opened:
    netns.setns(namespace)
    return _open_for(tun_fd)


def _open_for(tun_fd: int) -> _Opened:
    """Open them in the calling thread's namespace, which is the interface's."""
    with ExitStack() as stack:
        events = stack.enter_context(closing(open_events(LINKS)))
        requests = stack.enter_context(closing(RequestSocket()))
        # by its name, which may have changed with a move
        found = fcntl.ioctl(tun_fd, _TUNGETIFF, bytes(_IFREQ_BYTES))
        opened = _Opened(events, requests, socket.if_nametoindex(found[:16].rstrip(b"\0").decode()))
        stack.pop_all()
        return opened
