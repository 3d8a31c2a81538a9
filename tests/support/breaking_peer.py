"""A server that breaks every connection in one given way at one given moment: real sockets, frames written by hand."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from hyperframe.frame import GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame

from siderolink.common.grpc.listeners import accept

Socket = socket.socket
SETTINGS = SettingsFrame(0).serialize()


def _goaway(code: int, last: int = 0) -> bytes:
    return GoAwayFrame(0, last_stream_id=last, error_code=code).serialize()


def _reset(sock: Socket) -> None:
    """The next close sends a TCP RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _close(sock: Socket, _: object) -> None:
    sock.close()


def _half_headers() -> bytes:
    frame = HeadersFrame(1, flags=["END_HEADERS"])
    frame.data = b"\x88"  # :status 200, and no more of the answer
    return frame.serialize()


def _unknown_status() -> bytes:
    frame = HeadersFrame(1, flags=["END_HEADERS", "END_STREAM"])
    frame.data = b"\x88\x0f\x10\x10application/grpc" + b"\x00\x0bgrpc-status\x0499.9"
    return frame.serialize()


WAYS: dict[str, tuple[bytes, str]] = {
    "goaway": (SETTINGS + _goaway(0), "fin"),
    "goaway-calm": (SETTINGS + _goaway(11), "fin"),
    "goaway-all": (SETTINGS + _goaway(0, last=2**31 - 1), "fin"),
    "goaway-stays": (SETTINGS + _goaway(0), "silence"),
    "rst-stream": (SETTINGS + RstStreamFrame(1, error_code=8).serialize(), "silence"),
    "rst-stream-fin": (SETTINGS + RstStreamFrame(1, error_code=7).serialize(), "fin"),
    "tcp-rst": (b"", "rst"),
    "settings-tcp-rst": (SETTINGS, "rst"),
    "fin": (b"", "fin"),
    "settings-fin": (SETTINGS, "fin"),
    "half-close": (SETTINGS, "half-close"),
    "garbage": (bytes(range(256)) * 8, "silence"),
    "garbage-fin": (b"\xff" * 100, "fin"),
    "http1": (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", "fin"),
    "half-answer": (SETTINGS + _half_headers(), "fin"),
    "odd-status": (SETTINGS + _unknown_status(), "silence"),
    "silence": (b"", "silence"),
    "settings-silence": (SETTINGS, "silence"),
}
"""What is written, and what follows: a FIN, a TCP RST, a half-closed connection, or silence."""

MOMENTS = ("before", "during", "after")
"""Relative to the client's first write: before it is read, in its middle, and once the call's headers are there."""


class BreakingPeer:
    """Breaks every connection, and counts them."""

    def __init__(self, way: str, moment: str, listening: Socket) -> None:
        self.connections = 0
        self._answer, self._end = WAYS[way]
        self._moment = moment
        self._listening = listening
        self._open: set[Socket] = set()
        self._counted = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def port(self) -> int:
        return int(self._listening.getsockname()[1])

    async def until_connections(self, condition: Callable[[int], bool]) -> None:
        while not condition(self.connections):
            self._counted.clear()
            await self._counted.wait()

    async def run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                sock, _ = await accept(self._listening)
                task = self._loop.create_task(self._serve(sock))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(partial(_close, sock))  # also if it was cancelled before it began
        finally:
            for task in tuple(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, sock: Socket) -> None:
        with sock:
            sock.setblocking(False)
            try:
                await self._read(sock)
                self.connections += 1
                self._counted.set()
                await self._loop.sock_sendall(sock, self._answer)
                if self._end == "rst":
                    _reset(sock)
                elif self._end == "half-close":
                    sock.shutdown(socket.SHUT_WR)
                    await self._until_closed(sock)
                elif self._end == "silence":
                    await self._until_closed(sock)
            except OSError:
                pass  # the client has closed it first

    async def _read(self, sock: Socket) -> None:
        if self._moment == "during":
            await self._loop.sock_recv(sock, 7)
        if self._moment == "after":
            # an idle channel sends no headers, so wait only for its first write
            await self._loop.sock_recv(sock, 65536)
            await asyncio.sleep(0.01)

    async def _until_closed(self, sock: Socket) -> None:
        while await self._loop.sock_recv(sock, 65536):
            pass


@asynccontextmanager
async def breaking_peer(way: str, moment: str, *, path: Path | None = None) -> AsyncIterator[BreakingPeer]:
    """A peer on the loopback, or on a local socket."""
    if path is None:
        listening = socket.create_server(("127.0.0.1", 0))
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(path))
        listening.listen()
    with listening:
        listening.setblocking(False)
        peer = BreakingPeer(way, moment, listening)
        task = asyncio.get_running_loop().create_task(peer.run())
        try:
            yield peer
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
