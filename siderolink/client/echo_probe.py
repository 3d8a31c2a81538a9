"""What a link learns by ICMPv6 echo requests to the server's overlay address.

Whether the session still carries, where the kernel has no way to renew it but to forget it; and whether packets as large as the
interface takes pass: some paths let handshakes through and lose large datagrams. Only where small ones are answered and no
large one is, the path is at fault; a server that answers no echo says nothing about it.
"""

import asyncio
import os
import socket
from contextlib import closing
from functools import partial
from ipaddress import IPv6Address

import anyio

from siderolink.common.netlink import call_in
from siderolink.common.wireguard.device import DEFAULT_MTU

ROUNDS = 10
"""With a fifth of all datagrams lost each way, all ten large ones are lost once in thirty thousand times."""
_INTERVAL = 0.5
_SMALL, _LARGE = 16, DEFAULT_MTU - 48
"""Payload bytes: the large one makes an IPv6 packet of 1,280 bytes."""
_ECHO_REQUEST, _ECHO_REPLY = 128, 129
_MARK = 8


async def is_answered(interface: str, server: IPv6Address, namespace: str | None) -> bool:
    """Whether one of two small requests comes back within a second. `namespace` is where the interface is."""
    try:
        probe = _Probe(interface, namespace)
    except OSError:  # this process may open no raw socket
        return False
    with closing(probe):
        for sequence in range(2):
            probe.send(server, sequence, _SMALL)
            with anyio.move_on_after(_INTERVAL):
                await probe.any.wait()
                return True
    return False


async def large_packets_pass(interface: str, server: IPv6Address, namespace: str | None) -> bool | None:
    """True or False; None where it cannot be told. `namespace` is where the interface is."""
    try:
        probe = _Probe(interface, namespace)
    except OSError:
        return None
    with closing(probe):
        for sequence in range(ROUNDS):
            for size in (_SMALL, _LARGE):
                probe.send(server, sequence, size)
            with anyio.move_on_after(_INTERVAL):
                await probe.large.wait()
                return True
    return False if len(probe.small) >= ROUNDS // 3 else None


def _open_socket(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    except BaseException:
        opened.close()
        raise
    return opened


class _Probe:
    """Raises OSError, and ConfigurationError for a namespace that is not there."""

    def __init__(self, interface: str, namespace: str | None) -> None:
        self.any = anyio.Event()
        self.large = anyio.Event()
        self.small: set[bytes] = set()
        self._mark = os.urandom(_MARK)
        self._loop = asyncio.get_running_loop()
        self._socket = call_in(namespace, partial(_open_socket, interface))
        self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def send(self, server: IPv6Address, sequence: int, size: int) -> None:
        name = self._mark[:2]
        # The kernel fills in the checksum (RFC 3542, 3.1).
        packet = bytes((_ECHO_REQUEST, 0, 0, 0)) + name + sequence.to_bytes(2, "big") + self._mark
        try:
            self._socket.sendto(packet.ljust(8 + size, b"\0"), (str(server), 0))
        except OSError:  # the interface is down or gone: somebody else's business
            pass

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(2048)
            except OSError:
                return
            if len(data) >= 8 + _MARK and data[0] == _ECHO_REPLY and data[8 : 8 + _MARK] == self._mark:
                self.any.set()
                if len(data) >= 8 + _LARGE:
                    self.large.set()
                else:
                    self.small.add(data[6:8])
