"""Reads a UDP socket of many senders on the event loop, in bounded time."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final

from siderolink.common.readers import read_on

AT_ONCE: Final = 64
"""Maximum datagrams of one turn of the event loop."""
TURN_SECONDS: Final = 0.001
"""Time after which a turn ends, too."""
REST: Final = 3
"""After a turn that left datagrams behind, the socket rests for this many times as long: a quarter of one processor remains."""


class DatagramReader:
    """Calls `receive` for each datagram, until it is closed. The socket stays the caller's.

    In one turn of the loop at most AT_ONCE datagrams are read. Whoever sends more delays the others' datagrams, and the kernel
    drops those that its buffer has no room for.
    """

    def __init__(self, sock: socket.socket, receive: Callable[[bytes, Any], object], max_bytes: int) -> None:
        """`receive` gets the datagram, cut to `max_bytes`, and its sender's socket address."""
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._receive = receive
        self._max_bytes = max_bytes
        self._resting: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock, self._read)

    def close(self) -> None:
        """Stop reading."""
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self._sock)

    def _read(self) -> None:
        began = now = self._loop.time()
        for _ in range(AT_ONCE):
            try:
                data, sender = self._sock.recvfrom(self._max_bytes)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:  # a delayed error of an earlier send
                read_on(self._loop, self._sock, self._read)
                continue
            self._receive(data, sender)
            now = self._loop.time()
            if now - began > TURN_SECONDS:
                break
        self._loop.remove_reader(self._sock)
        self._resting = self._loop.call_later(REST * (now - began), self._go_on)

    def _go_on(self) -> None:
        self._resting = None
        self._loop.add_reader(self._sock, self._read)
