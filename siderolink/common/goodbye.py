"""The goodbye: a machine that stops cleanly tells the server so, inside its WireGuard session.

One UDP datagram from the machine's overlay address to GOODBYE_PORT at the server's overlay address, answered by the same bytes.
The session authenticates it, so nobody else can say goodbye for a machine. Afterwards the server lets the machine's next start
take its row at once, also with another key and without a unique token. A server that does not know the message answers with
ICMPv6 "port unreachable" or not at all, and nothing depends on the answer.

    bytes 0-3   the magic b"SLby"
    byte  4     version, 1
    byte  5     flags: bit 0 asks the server to forget the machine (trial joins); other bits are sent as zero and ignored
    bytes 6-37  the sender's WireGuard public key; a goodbye for another key than the session's is ignored
"""

import asyncio
import socket
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Self

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.keys import KEY_BYTES, PublicKey
from siderolink.common.overlay_socket import bind_overlay

GOODBYE_PORT = 50887
"""UDP, at the server's overlay address."""

_HEADER = b"SLby\x01"
_FORGET = 0x01
GOODBYE_BYTES = len(_HEADER) + 1 + KEY_BYTES
_TRIES = 3
_ANSWER_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """One goodbye."""

    public_key: PublicKey
    """The key of the session that ends."""
    forget: bool = False
    """Delete the machine's row, because it was a trial join."""

    def encode(self) -> bytes:
        """The datagram, GOODBYE_BYTES long."""
        return _HEADER + bytes([_FORGET if self.forget else 0]) + bytes(self.public_key)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Read a datagram; None for anything but a goodbye of version 1."""
        if len(data) != GOODBYE_BYTES or not data.startswith(_HEADER):
            return None
        return cls(public_key=PublicKey(data[6:]), forget=bool(data[5] & _FORGET))


async def say_goodbye(
    goodbye: Goodbye, *, source: IPv6Address, server: IPv6Address, interface: str, namespace: str | None = None
) -> bool:
    """Send a goodbye from the machine's overlay address; call it while the link still carries packets.

    `namespace` is where the interface is. True if the server answered. Takes 0.6 s at most and never raises for a network or
    a server that does not answer.
    """
    message = goodbye.encode()
    loop = asyncio.get_running_loop()
    try:
        sock = await bind_overlay(source, 0, interface, udp=True, patience=0.0, namespace=namespace)
    except SideroLinkError:
        return False
    with sock:
        try:
            sock.connect((str(server), GOODBYE_PORT))
            for _ in range(_TRIES):
                sock.send(message)
                with anyio.move_on_after(_ANSWER_SECONDS):
                    if await _received(loop, sock) == message:
                        return True
        except OSError:  # unreachable, or the server does not know the message
            return False
    return False


async def _received(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    return await loop.sock_recv(sock, GOODBYE_BYTES + 1)
