"""A small HTTP/1.1 server for read-only pages: metrics and health. One request per connection.

The cost of a client is bounded: connections at a time and per second, bytes of a request, seconds to send it and to read the
answer, and long answers that are kept for slow readers. When all connections are in use, a new one replaces the one that has
waited longest for its client: idle clients keep no one out.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Final

from siderolink.common.errors import host_error
from siderolink.common.grpc import source_of
from siderolink.common.grpc.listeners import listen_tcp
from siderolink.common.hostport import HostPort
from siderolink.common.newest_dict import NewestDict
from siderolink.common.token_bucket import TokenBucket

MAX_CONNECTIONS: Final = 16
MAX_REQUEST_BYTES: Final = 8 * 1024
REQUEST_TIMEOUT: Final = 5.0
"""Time limit in seconds for a client to send its request."""
ANSWER_TIMEOUT: Final = 30.0
"""Time limit in seconds to produce the answer and for a client to read it."""
CONNECTIONS_PER_SECOND: Final = 20
"""From one source; more are closed at once, without being read."""
CONNECTION_BURST: Final = 40
ACCEPTS_PER_TURN: Final = 4
MAX_LONG_ANSWERS: Final = 2
"""Different long answers in memory for clients that still read them; those that read an older one are disconnected."""
LONG_ANSWER_BYTES: Final = 64 * 1024
"""Size of a long answer; also how much of an answer is written at once."""
_MAX_SOURCES: Final = 1024
_ACCEPT_PAUSE: Final = 0.5

_logger = logging.getLogger("siderolink.cli")


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """The response of a page."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


Page = Callable[[], Awaitable[PageAnswer]]


class PageServer:
    """Answers GET and HEAD for some paths; created by `serve_pages`."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._open: set[asyncio.Task[None]] = set()
        self._idle: dict[asyncio.Task[None], None] = {}
        """Tasks that wait for their client to send a request or to read the answer, longest wait first."""
        self._long: dict[asyncio.Task[None], bytes] = {}
        """The long answers that are being read, oldest first."""
        self._listening: set[socket.socket] = set()
        self._buckets: NewestDict[str, TokenBucket] = NewestDict(_MAX_SOURCES)

    def listen(self, sock: socket.socket) -> None:
        """Accept connections of a listening socket until the end."""
        self._listening.add(sock)
        asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, address = sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # the client has already disconnected
                continue
            except OSError:  # out of descriptors or memory
                loop.remove_reader(sock)
                loop.call_later(_ACCEPT_PAUSE, self._listen_again, sock)
                return
            if self._admits(str(address[0])) and self._make_room():
                connection.setblocking(False)
                self._begin(connection)
            else:
                connection.close()

    def _listen_again(self, sock: socket.socket) -> None:
        if sock in self._listening:
            self.listen(sock)

    def _admits(self, address: str) -> bool:
        """Whether this source may have another connection now."""
        source = source_of(address, 64)
        bucket = self._buckets.get(source) or TokenBucket(CONNECTIONS_PER_SECOND, CONNECTION_BURST)
        self._buckets.put(source, bucket)
        return bucket.take(1)

    def _make_room(self) -> bool:
        """End the connection that has waited longest for its client if there are too many; returns False if none waits."""
        if len(self._open) < MAX_CONNECTIONS:
            return True
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]
        oldest.cancel()
        return True

    def _begin(self, connection: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(connection))
        self._open.add(task)
        self._idle[task] = None
        task.add_done_callback(partial(self._ended, connection))

    def _ended(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        self._idle.pop(task, None)
        self._long.pop(task, None)
        connection.close()  # for a task that was cancelled before its start

    async def end(self) -> None:
        for sock in self._listening:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._listening.clear()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, connection: socket.socket) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            reader, writer = await asyncio.open_connection(sock=connection, limit=MAX_REQUEST_BYTES)
        except OSError:
            return
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                request = await _read_head(reader)
            self._idle.pop(task, None)
            async with asyncio.timeout(ANSWER_TIMEOUT):
                method, answer = await self._answer(request)
                self._idle[task] = None
                body = b"" if method == "HEAD" else answer.body
                self._keep(task, body)
                await _send(writer, _head(answer), body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the client has disconnected, or is too slow
        finally:
            writer.transport.abort()

    def _keep(self, task: asyncio.Task[None], body: bytes) -> None:
        """Note who reads a long answer; too many different ones end the readers of the oldest."""
        if len(body) <= LONG_ANSWER_BYTES:
            return
        self._long[task] = body
        while len({id(one) for one in self._long.values()}) > MAX_LONG_ANSWERS:
            oldest = next(iter(self._long))
            del self._long[oldest]
            oldest.cancel()

    async def _answer(self, request: bytes | None) -> tuple[str, PageAnswer]:
        """The request's method, and the response."""
        if request is None:
            return "", _error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        parts = request.partition(b"\r\n")[0].decode("latin-1").split(" ")
        if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
            return "", _error(HTTPStatus.BAD_REQUEST)
        method, target, _ = parts
        page = self._pages.get(target.partition("?")[0])
        if page is None:
            return method, _error(HTTPStatus.NOT_FOUND, "available: " + ", ".join(self._pages))
        if method not in ("GET", "HEAD"):
            return method, _error(HTTPStatus.METHOD_NOT_ALLOWED)
        try:
            return method, await page()
        except Exception as error:
            if (failure := host_error(error)) is None:
                _logger.exception("the page %s failed", target.partition("?")[0])
                return method, _error(HTTPStatus.INTERNAL_SERVER_ERROR)
            _logger.error("the page %s failed: %s", target.partition("?")[0], failure)
            return method, _error(HTTPStatus.SERVICE_UNAVAILABLE)


@asynccontextmanager
async def serve_pages(listen: HostPort, pages: Mapping[str, Page]) -> AsyncIterator[int]:
    """Serve until the context ends; yields the TCP port. Raises AddressInUseError or ConfigurationError."""
    server = PageServer(pages)
    sockets = listen_tcp([listen.host], listen.port)
    port: int = sockets[0].getsockname()[1]
    try:
        for sock in sockets:
            server.listen(sock)
        yield port
    finally:
        await server.end()


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    """The request line and headers; None if they are too long."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return None


def _error(status: HTTPStatus, text: str = "") -> PageAnswer:
    return PageAnswer(f"{status.phrase}{': ' if text else ''}{text}\n".encode(), status=status)


def _head(answer: PageAnswer) -> bytes:
    return (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    ).encode("latin-1")


async def _send(writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
    """Write a part at a time, so that a slow reader needs no copy of the whole."""
    parts = (body[start : start + LONG_ANSWER_BYTES] for start in range(0, len(body), LONG_ANSWER_BYTES))
    for part in chain([head], parts):
        if writer.is_closing():
            return  # uvloop's transport raises RuntimeError for a write then
        writer.write(part)
        await writer.drain()
    writer.close()
    await writer.wait_closed()
