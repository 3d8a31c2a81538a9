"""Pings in the overlay: ICMPv6 echo requests by the server's interface, and the addresses that answer."""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import IPv6Address
from typing import Final

from siderolink.common.netlink import call_in
from siderolink.server.store import Machine

_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_ICMP6_FILTER: Final = 1
_RECEIVE_BYTES = 256
_AT_ONCE = 64


class Echoes:
    """A socket that sends pings and receives their answers."""

    def __init__(self, sock: socket.socket, on_answer: Callable[[IPv6Address], None]) -> None:
        self._socket = sock
        self._on_answer = on_answer
        self._nonce = os.urandom(16)
        self._number = 0

    def send(self, machine: Machine) -> None:
        """Ping a machine. Ignores send errors."""
        self.ping(machine.overlay_address)

    def ping(self, address: IPv6Address) -> None:
        self._number = (self._number + 1) & 0xFFFF
        message = struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, 0x534C, self._number) + self._nonce
        try:
            self._socket.sendto(message, (str(address), 0))
        except OSError:
            pass

    def receive(self) -> None:
        """Process waiting answers."""
        for _ in range(_AT_ONCE):
            try:
                data, source = self._socket.recvfrom(_RECEIVE_BYTES)
            except OSError:
                return
            if data[:1] == bytes([_ECHO_REPLY]) and data[8:] == self._nonce:
                self._on_answer(IPv6Address(source[0].partition("%")[0]))


@asynccontextmanager
async def open_echoes(
    interface: str, namespace: str | None, on_answer: Callable[[IPv6Address], None]
) -> AsyncIterator[Echoes | None]:
    """Open a socket for pings on the server's interface; None without the privilege."""
    try:
        sock = call_in(namespace, partial(_open, interface))
    except OSError:
        yield None
        return
    loop = asyncio.get_running_loop()
    echoes = Echoes(sock, on_answer)
    with sock:
        loop.add_reader(sock, echoes.receive)
        try:
            yield echoes
        finally:
            loop.remove_reader(sock)


def _open(interface: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
        blocked = bytearray(b"\xff" * 32)
        blocked[_ECHO_REPLY // 32 * 4 : _ECHO_REPLY // 32 * 4 + 4] = struct.pack("=I", 0xFFFFFFFF & ~(1 << _ECHO_REPLY % 32))
        sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, bytes(blocked))
    except BaseException:
        sock.close()
        raise
    return sock
