"""Follows one TUN interface by netlink: whether it is up, its MTU, and into which network namespace it was moved.

A netlink socket hears of the namespace that it was made in. So when the interface leaves for another one, the monitor makes a
new socket there; what was made before (the UDP sockets) stays where it is, as WireGuard users expect.
"""

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from pyroute2 import netns
from pyroute2.netlink import NLM_F_REQUEST
from pyroute2.netlink.rtnl import RTM_DELLINK, RTM_NEWLINK, RTMGRP_LINK
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from siderolink.common.readers import read_on

_TUNGETDEVNETNS: Final = 0x54E3
_HEADER_BYTES: Final = 16
_RECEIVE_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class LinkState:
    """The interface as netlink describes it."""

    is_up: bool
    mtu: int


class LinkMonitor:
    """Calls `on_change` with each state of the interface that differs from the last one."""

    def __init__(self, tun_fd: int, name: str, on_change: Callable[[LinkState], None]) -> None:
        self._tun_fd = tun_fd
        self._name = name
        self._index = socket.if_nametoindex(name)
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._last: LinkState | None = None
        self._socket = _open_socket()
        self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def limit_gso(self, size: int) -> None:
        """Cap the super-packets that the interface gives; where the kernel does not take it, they stay as they are."""
        message = ifinfmsg()
        message["index"] = self._index
        message["attrs"] = [("IFLA_GSO_MAX_SIZE", size)]
        message["header"] = {"type": RTM_NEWLINK, "flags": NLM_F_REQUEST, "sequence_number": 0, "pid": 0}
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
            except OSError:  # messages were lost; the next one tells the state
                read_on(self._loop, self._socket, self._read)
                continue
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        offset = 0
        while offset + _HEADER_BYTES <= len(data):
            length = int.from_bytes(data[offset : offset + 4], "little")
            if length < _HEADER_BYTES:
                return
            if int.from_bytes(data[offset + 4 : offset + 6], "little") in (RTM_NEWLINK, RTM_DELLINK):
                message = ifinfmsg(data[offset : offset + length])
                message.decode()
                if message["index"] == self._index:
                    self._take(message)
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
        try:
            namespace = fcntl.ioctl(self._tun_fd, _TUNGETDEVNETNS)
        except OSError:
            return
        try:
            # A thread of its own, because a namespace belongs to a thread.
            with ThreadPoolExecutor(1) as thread:
                moved, self._index = thread.submit(_open_socket_in, namespace, self._name).result()
        except OSError:
            return
        finally:
            os.close(namespace)
        self.close()
        self._socket = moved
        self._loop.add_reader(self._socket, self._read)


def _open_socket() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
    opened.bind((0, RTMGRP_LINK))
    return opened


def _open_socket_in(namespace: int, name: str) -> tuple[socket.socket, int]:
    netns.setns(namespace)
    return _open_socket(), socket.if_nametoindex(name)
