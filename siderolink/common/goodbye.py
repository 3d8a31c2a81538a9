"""Messages between a machine and its server inside the WireGuard session: a machine's goodbye, and a server's request to move.

The goodbye: a machine announces an orderly stop to the server.

One UDP datagram from the machine's overlay address to GOODBYE_PORT at the server's overlay address, answered by the same bytes.
The session authenticates it, so nobody else can say goodbye for a machine. Afterwards the server admits the machine's next
start to its row immediately, even with another key and without a unique token. A server without support answers with ICMPv6
"port unreachable" or not at all; nothing depends on the answer.

    bytes 0-3   the magic b"SLby"
    byte  4     version, 1
    byte  5     flags: bit 0 asks the server to remove the machine (trial joins); other bits are sent as zero and ignored
    bytes 6-37  the sender's WireGuard public key; a goodbye for another key than the session's is ignored

The move: a draining server asks a machine to move to another server of the same store. One UDP datagram from GOODBYE_PORT at
the server's overlay address to the same port at the machine's, which then calls the API again and uses its answer. It is not
answered; machines without support stay until the server stops.

    bytes 0-3   the magic b"SLmv"
    byte  4     version, 1
    byte  5     sent as zero and ignored
    bytes 6-37  the server's WireGuard public key; a move with another key than the session's is ignored
"""

import asyncio
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Self

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.keys import KEY_BYTES, PublicKey
from siderolink.common.overlay_socket import bind_overlay

GOODBYE_PORT = 50887
"""UDP port at the server's overlay address."""

_HEADER = b"SLby\x01"
_MOVE_HEADER = b"SLmv\x01"
_FORGET = 0x01
GOODBYE_BYTES = len(_HEADER) + 1 + KEY_BYTES
MOVE_SECONDS = 0.5
MOVES_AT_ONCE = 256
_TRIES = 3
_ANSWER_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """A goodbye message."""

    public_key: PublicKey
    """The key of the ending session."""
    forget: bool = False
    """Whether to remove the machine's row, because it was a trial join."""

    def encode(self) -> bytes:
        """The datagram, GOODBYE_BYTES long."""
        return _HEADER + bytes([_FORGET if self.forget else 0]) + bytes(self.public_key)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Parse a datagram; None for anything but a goodbye of version 1."""
        if len(data) != GOODBYE_BYTES or not data.startswith(_HEADER):
            return None
        return cls(public_key=PublicKey(data[6:]), forget=bool(data[5] & _FORGET))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveAway:
    """A server's request to move to another server."""

    public_key: PublicKey
    """The server's key."""

    def encode(self) -> bytes:
        """The datagram, as long as a goodbye."""
        return _MOVE_HEADER + bytes(1) + bytes(self.public_key)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Parse a datagram; None for anything but a move of version 1."""
        if len(data) != GOODBYE_BYTES or not data.startswith(_MOVE_HEADER):
            return None
        return cls(public_key=PublicKey(data[6:]))


async def receive_move_requests(
    on_move: Callable[[PublicKey], None], *, address: IPv6Address, server: IPv6Address, interface: str, namespace: str | None
) -> None:
    """Call `on_move` with the server's key for each move received at the machine's address, until cancelled.

    Each may cost a call of the API, so those within MOVE_SECONDS count as one. `namespace` is the interface's.
    Raises SideroLinkError if the port is not available.
    """
    with await bind_overlay(address, GOODBYE_PORT, interface, udp=True, namespace=namespace) as sock:
        while True:
            await anyio.wait_readable(sock)  # uvloop has no sock_recvfrom
            for public_key in {move.public_key for move in _moves(sock, server)}:
                on_move(public_key)
            await anyio.sleep(MOVE_SECONDS)


def _moves(sock: socket.socket, server: IPv6Address) -> Iterator[MoveAway]:
    """The datagrams that the server has sent so far."""
    for _ in range(MOVES_AT_ONCE):
        try:
            data, source = sock.recvfrom(GOODBYE_BYTES + 1)
        except OSError:  # nothing is left, or the interface is down, which its watch reports
            return
        move = MoveAway.parse(data)
        if move is not None and IPv6Address(source[0].partition("%")[0]) == server:
            yield move


async def say_goodbye(
    goodbye: Goodbye, *, source: IPv6Address, server: IPv6Address, interface: str, namespace: str | None = None
) -> bool:
    """Send a goodbye from the machine's overlay address; call this while the link still carries packets.

    `namespace` is the interface's. Returns whether the server answered. Takes at most 0.6 s, and raises neither for network
    errors nor for a missing answer.
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
        except OSError:  # unreachable, or the server does not support the message
            return False
    return False


async def _received(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    return await loop.sock_recv(sock, GOODBYE_BYTES + 1)
