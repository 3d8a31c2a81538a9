"""A small HTTP/1.1 server for read-only pages: metrics and health. One request per connection.

The cost of a client is bounded: concurrent connections, bytes of a request, and seconds to send it and to read the answer. When
all connections are in use, a new one replaces the one that has waited longest for its client: idle clients keep no one out.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from siderolink.common.errors import host_error
from siderolink.common.grpc.listeners import listen_tcp
from siderolink.common.hostport import HostPort

MAX_CONNECTIONS: Final = 16
MAX_REQUEST_BYTES: Final = 8 * 1024
REQUEST_TIMEOUT: Final = 5.0
"""Time limit in seconds for a client to send its request."""
ANSWER_TIMEOUT: Final = 30.0
"""Time limit in seconds to produce the answer and for a client to read it."""

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

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                writer.transport.abort()
                return
            del self._idle[oldest]
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._open.add(task)
        self._idle[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        self._idle.pop(task, None)

    async def end(self) -> None:
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                request = await _read_head(reader)
            self._idle.pop(task, None)
            async with asyncio.timeout(ANSWER_TIMEOUT):
                method, answer = await self._answer(request)
                if writer.is_closing():
                    return  # uvloop's transport raises RuntimeError for a write then
                self._idle[task] = None
                writer.write(_encode(answer, with_body=method != "HEAD"))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # the client has disconnected, or is too slow
        finally:
            writer.transport.abort()

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
    listeners: list[asyncio.Server] = []
    sockets = listen_tcp([listen.host], listen.port)
    port: int = sockets[0].getsockname()[1]
    try:
        for sock in sockets:
            listener = await asyncio.start_server(server.accept, sock=sock, limit=MAX_REQUEST_BYTES)
            listeners.append(listener)
        yield port
    finally:
        for listener in listeners:
            listener.close()
        for sock in sockets:
            sock.close()
        await server.end()


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    """The request line and headers; None if they are too long."""
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        return None


def _error(status: HTTPStatus, text: str = "") -> PageAnswer:
    return PageAnswer(f"{status.phrase}{': ' if text else ''}{text}\n".encode(), status=status)


def _encode(answer: PageAnswer, *, with_body: bool) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + (answer.body if with_body else b"")
