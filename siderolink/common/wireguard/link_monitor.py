"""Follows one TUN interface by netlink: whether it is up, its MTU, and into which network namespace it was moved.

A netlink socket hears of the namespace that it was made in. So when the interface leaves for another one, the monitor makes a
new socket there; what was made before (the UDP sockets) stays where it is, as WireGuard users expect. Whatever happened before
a socket began to hear is asked for: an interface may be set up, or move on, right after it was moved.
"""

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

from pyroute2 import netns
from pyroute2.netlink import NLM_F_REQUEST, NLMSG_ERROR
from pyroute2.netlink.rtnl import RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK, RTMGRP_LINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from siderolink.common.netlink import call_in
from siderolink.common.readers import read_on

_TUNGETDEVNETNS: Final = 0x54E3
_TUNGETIFF: Final = 0x800454D2
_IFREQ_BYTES: Final = 40
_QUESTION: Final = 1
"""The sequence number of a question about the interface; an error in answer to that says it is not here."""
_HEADER_BYTES: Final = 16
_MOVES: Final = 10
_RECEIVE_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class LinkState:
    """The interface as netlink describes it."""

    is_up: bool
    mtu: int


class LinkMonitor:
    """Calls `on_change` with each state of the interface that differs from the last one."""

    def __init__(self, tun_fd: int, on_change: Callable[[LinkState], None], namespace: str | None = None) -> None:
        """`namespace` is where the interface is, if not in the calling thread's."""
        self._tun_fd = tun_fd
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._last: LinkState | None = None
        opened, self._index = call_in(namespace, partial(_open_socket_for, tun_fd))
        self._listen(opened)

    def _listen(self, heard: socket.socket) -> None:
        self._socket = heard
        self._loop.add_reader(heard, self._read)
        self._ask()

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def limit_gso(self, size: int) -> None:
        """Cap the super-packets that the interface gives; where the kernel does not take it, they stay as they are."""
        self._send(RTM_NEWLINK, 0, [("IFLA_GSO_MAX_SIZE", size)])

    def _ask(self) -> None:
        self._send(RTM_GETLINK, _QUESTION, [])

    def _send(self, kind: int, number: int, attributes: list[tuple[str, int]]) -> None:
        message = ifinfmsg()
        message["index"] = self._index
        message["attrs"] = attributes
        message["header"] = {"type": kind, "flags": NLM_F_REQUEST, "sequence_number": number, "pid": 0}
        message.encode()
        try:
            self._socket.send(message.data)
        except OSError:
            pass

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError:  # messages were lost
                self._ask()
                read_on(self._loop, self._socket, self._read)
                continue
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        offset = 0
        while offset + _HEADER_BYTES <= len(data):
            length = int.from_bytes(data[offset : offset + 4], "little")
            if length < _HEADER_BYTES:
                return
            kind = int.from_bytes(data[offset + 4 : offset + 6], "little")
            if kind in (RTM_NEWLINK, RTM_DELLINK):
                message = ifinfmsg(data[offset : offset + length])
                message.decode()
                if message["index"] == self._index:
                    self._take(message)
            elif kind == NLMSG_ERROR and int.from_bytes(data[offset + 8 : offset + 12], "little") == _QUESTION:
                self._follow()
            offset += (length + 3) & ~3

    def _take(self, message: ifinfmsg) -> None:
        kind = message["header"]["type"]
        if kind == RTM_DELLINK:
            self._follow()
        else:
            state = LinkState(bool(message["flags"] & 1), message.get_attr("IFLA_MTU"))
            if state != self._last:
                self._last = state
                self._on_change(state)

    def _follow(self) -> None:
        """The interface left this namespace: listen where it is now. If it is gone, reading it says so."""
        for _ in range(_MOVES):
            try:
                namespace = fcntl.ioctl(self._tun_fd, _TUNGETDEVNETNS)
            except OSError:
                return
            try:
                # A thread of its own, because a namespace belongs to a thread.
                with ThreadPoolExecutor(1) as thread:
                    moved, index = thread.submit(_open_socket_in, namespace, self._tun_fd).result()
            except OSError:  # it has moved on
                continue
            finally:
                os.close(namespace)
            self.close()
            self._index = index
            self._listen(moved)
            return


def _index(tun_fd: int) -> int:
    """By its name, which may have changed with a move; in the namespace of the calling thread."""
    found = fcntl.ioctl(tun_fd, _TUNGETIFF, bytes(_IFREQ_BYTES))
    return socket.if_nametoindex(found[:16].rstrip(b"\0").decode())


def _open_socket() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    opened.bind((0, RTMGRP_LINK))
    return opened


def _open_socket_in(namespace: int, tun_fd: int) -> tuple[socket.socket, int]:
    netns.setns(namespace)
    return _open_socket_for(tun_fd)


def _open_socket_for(tun_fd: int) -> tuple[socket.socket, int]:
    opened = _open_socket()
    try:
        return opened, _index(tun_fd)
    except OSError:
        opened.close()
        raise
