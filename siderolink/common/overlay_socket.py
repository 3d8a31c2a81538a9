"""Sockets reachable only from the overlay: bound to an overlay address and its interface.

The address alone is not enough. Linux accepts a packet for any of its addresses on any interface, so a neighbour on the LAN
could reach a socket on the overlay address, even with a forged source. Packets from the WireGuard interface are authenticated,
and their source is the one address that the peer may use.
"""

import asyncio
import errno
import socket
import time
from functools import partial
from ipaddress import IPv6Address

import anyio

from siderolink.common.errors import AddressInUseError, ConfigurationError
from siderolink.common.netlink import call_in

BACKLOG = 256
RETRY_SECONDS = 0.1
PATIENCE_SECONDS = 20.0
DIAL_SECONDS = 10.0
_NOT_YET = (errno.EADDRNOTAVAIL, errno.ENODEV)


async def bind_overlay(
    address: IPv6Address,
    port: int,
    interface: str,
    *,
    udp: bool = False,
    patience: float = PATIENCE_SECONDS,
    namespace: str | None = None,
) -> socket.socket:
    """A socket at the address that only receives from `interface`: listening for TCP, or open for UDP. Port 0: a free one.

    Waits up to `patience` seconds for the address to appear on the interface. `namespace` is the interface's.
    Raises AddressInUseError or ConfigurationError.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return call_in(namespace, partial(_bind, address, port, interface, udp=udp))
        except OSError as error:
            where = f"[{address}]:{port} on {interface}"
            if error.errno == errno.EADDRINUSE:
                raise AddressInUseError(f"{where} is in use by another process; choose another port") from error
            if error.errno not in _NOT_YET or time.monotonic() >= until:
                raise ConfigurationError(f"cannot listen at {where}: {error.strerror or error}") from error
        # there is no notification for an address becoming usable, or an interface appearing
        await anyio.sleep(RETRY_SECONDS)


async def dial_overlay(
    source: IPv6Address, target: IPv6Address, port: int, interface: str, *, namespace: str | None = None
) -> socket.socket:
    """A TCP connection between two addresses of the overlay, only by `interface`.

    `namespace` is the interface's. Raises OSError, TimeoutError after `DIAL_SECONDS`, or ConfigurationError.
    """
    sock = call_in(namespace, partial(_bind, source, 0, interface, udp=False, listen=False))
    try:
        with anyio.fail_after(DIAL_SECONDS):
            await asyncio.get_running_loop().sock_connect(sock, (str(target), port))
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(address: IPv6Address, port: int, interface: str, *, udp: bool, listen: bool = True) -> socket.socket:
    kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET6, kind | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if not udp and listen:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
        sock.bind((str(address), port))
        if not udp and listen:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
