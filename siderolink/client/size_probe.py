"""Whether packets as large as the interface takes pass the link: some paths let handshakes through and lose large datagrams.

Two ICMPv6 echo requests at a time, a small and a large one, go to the server's overlay address. Only where small ones are
answered and no large one is, the path is at fault; a server that answers no echo says nothing about it.
"""

import asyncio
import os
import socket
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


async def large_packets_pass(interface: str, server: IPv6Address, namespace: str | None) -> bool | None:
    """True or False; None where it cannot be told. `namespace` is where the interface is."""
    try:
        probe = _Probe(call_in(namespace, partial(_open_socket, interface)))
    except OSError:  # this process may open no raw socket
        return None
    try:
        return await _ask(probe, str(server))
    finally:
        probe.close()


async def _ask(probe: "_Probe", server: str) -> bool | None:
    small = 0
    for sequence in range(ROUNDS):
        for size in (_SMALL, _LARGE):
            probe.send(server, sequence, size)
        with anyio.move_on_after(_INTERVAL):
            await probe.large.wait()
        if probe.large.is_set():
            return True
        small = len(probe.small)
    return False if small >= ROUNDS // 3 else None


def _open_socket(interface: str) -> socket.socket:
    opened = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    except BaseException:
        opened.close()
        raise
    return opened


class _Probe:
    def __init__(self, sock: socket.socket) -> None:
        self.large = anyio.Event()
        self.small: set[bytes] = set()
        self._mark = os.urandom(_MARK)
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._loop.add_reader(sock, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def send(self, server: str, sequence: int, size: int) -> None:
        name = self._mark[:2]
        # The kernel fills in the checksum (RFC 3542, 3.1).
        packet = bytes((_ECHO_REQUEST, 0, 0, 0)) + name + sequence.to_bytes(2, "big") + self._mark
        try:
            self._socket.sendto(packet.ljust(8 + size, b"\0"), (server, 0))
        except OSError:  # the interface is down or gone: somebody else's business
            pass

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(2048)
            except OSError:
                return
            if len(data) >= 8 + _MARK and data[0] == _ECHO_REPLY and data[8 : 8 + _MARK] == self._mark:
                if len(data) >= 8 + _LARGE:
                    self.large.set()
                else:
                    self.small.add(data[6:8])
