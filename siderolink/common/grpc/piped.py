"""A TCP connection carried in a byte stream, with flow control in both directions.

Each message of the stream is protobuf: field 1, bytes; field 2, true if these are the last ones (a half-closed connection);
field 3, padding. A stream that ends before both sides have sent their last bytes was cut. Data from the stream is credited to
its window once it was written to the connection: a connection that accepts nothing holds one window of bytes here, and no
other stream waits for it.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

import anyio
from grpclib import GRPCError, Status

from siderolink.common.errors import SideroLinkError, reason_of
from siderolink.common.grpc.byte_stream import ByteStream
from siderolink.common.grpc.messages import PREFIX_BYTES, check_prefix, framed
from siderolink.common.protobuf_wire import (
    BYTES,
    VARINT,
    MalformedWireError,
    encode_varint,
    read_key,
    read_varint,
    value_bounds,
)

PIPE_WINDOW_BYTES: Final = 192 * 1024
"""How much a peer may send on one stream before it is written out: the stream window of both ends."""
CHUNK_BYTES: Final = 16 * 1024
"""Bytes read from a connection at once while the stream has room."""
MAX_DATA_BYTES: Final = 64 * 1024
"""Maximum data of one message."""
_OVERHEAD_BYTES: Final = 16
_DATA, _END = 1, 2
_DATA_KEY, _END_FIELD, _PADDING_KEY = bytes([_DATA << 3 | BYTES]), bytes([_END << 3 | VARINT, 1]), bytes([3 << 3 | BYTES])
_LEAST_BYTES: Final = 32
"""Many shorter DATA frames are considered an attack."""
_MAX_FIELDS: Final = 8
_RESET: Final = struct.pack("ii", 1, 0)


class PipeCutError(SideroLinkError):
    """Raised when a pipe ends in another way than by both sides' closing it."""

    def __init__(self, text: str, *, is_connection: bool) -> None:
        super().__init__(text)
        self.is_connection = is_connection
        """Whether the TCP connection was cut, rather than the stream."""


class Inbox:
    """The unprocessed messages of a stream, limited by its window."""

    def __init__(self, stream: ByteStream) -> None:
        """Starts receiving."""
        self.held = 0
        """Bytes received and not credited yet."""
        self._stream = stream
        self._partial = bytearray()
        self._messages: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._has_ended = False
        stream.receive(self._split_messages, credited=True)

    async def next(self) -> bytes | None:
        """The next message; None after the stream has ended and all were returned. Call `credit` after processing it."""
        while not self._messages:
            if self._has_ended:
                return None
            self._news.clear()
            await self._news.wait()
        return self._messages.popleft()

    def rest(self) -> bytes:
        """All unprocessed bytes as received, for the stream's next receiver."""
        rest = b"".join(map(framed, self._messages)) + bytes(self._partial)
        self._messages.clear()
        self._partial.clear()
        return rest

    def credit(self, message: bytes) -> None:
        """Confirm a processed message: the peer may send as much again."""
        size = len(message) + PREFIX_BYTES
        self.held -= size
        self._stream.credit(size)

    def end(self) -> None:
        """Mark the end of the stream; earlier messages are still returned."""
        self._has_ended = True
        self._news.set()

    def _split_messages(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            self._partial += piece
            self.held += len(piece)
        data, start = self._partial, 0
        try:
            while len(data) - start >= PREFIX_BYTES:
                body = start + PREFIX_BYTES
                length = int.from_bytes(data[start + 1 : body])
                check_prefix(data[start], length, MAX_DATA_BYTES + _OVERHEAD_BYTES)
                end = body + length
                if end > len(data):
                    break
                self._messages.append(bytes(data[body:end]))
                start = end
        finally:
            if start:
                del data[:start]
                self._news.set()


class JoinedStreams:
    """A caller's stream and the one that continues it: messages of each are sent on the other, and credited once sent."""

    def __init__(self, requests: Inbox) -> None:
        self.requests = requests
        self.answers: Inbox | None = None

    @property
    def held(self) -> int:
        """Bytes received on one stream that have not left on the other."""
        return self.requests.held + (0 if self.answers is None else self.answers.held)


class Pipe:
    """One TCP connection in one stream."""

    def __init__(self, stream: ByteStream, inbox: Inbox, sock: socket.socket) -> None:
        """`sock` must be non-blocking and remains the caller's."""
        self.to_connection = self.from_connection = 0
        """Bytes written to the connection, and read from it."""
        self._stream = stream
        self._inbox = inbox
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._outgoing = 0
        self._is_read = asyncio.Event()
        self._is_written = asyncio.Event()
        self._error: Exception | None = None

    @property
    def held(self) -> int:
        """Bytes received on one side that have not left on the other."""
        return self._inbox.held + self._outgoing

    async def run(self) -> None:
        """Run until both sides have half-closed. The server's handler returns after the caller has ended the stream.

        Raises PipeCutError if one side was cut, GRPCError for a malformed message or the status with which the server ended the
        stream, and StreamTerminatedError.
        """
        async with anyio.create_task_group() as tasks:
            watch = partial(self._guarded, self._watch, tasks.cancel_scope)
            tasks.start_soon(watch)
            tasks.start_soon(self._guarded, self._write_out, tasks.cancel_scope)
            tasks.start_soon(self._guarded, self._read_in, tasks.cancel_scope)
            await self._is_read.wait()
            await self._is_written.wait()
            tasks.cancel_scope.cancel()
        if self._error is not None:
            raise self._error

    async def _guarded(self, work: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
        """The first error ends the pipe, because both directions often see the same cut connection."""
        try:
            await work()
        except Exception as error:
            self._error = self._error or error
            scope.cancel()

    async def _watch(self) -> None:
        await self._stream.wait_ended()
        self._inbox.end()
        await self._is_written.wait()
        if not self._is_read.is_set():
            raise _cut()

    async def _write_out(self) -> None:
        """Write the stream's data to the connection until its end mark."""
        while (message := await self._inbox.next()) is not None:
            data, is_end = read_message(message)
            try:
                if data:
                    await self._loop.sock_sendall(self._socket, data)
                    self.to_connection += len(data)
                if is_end:
                    self._socket.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise PipeCutError(reason_of(error), is_connection=True) from None
            self._inbox.credit(message)
            if is_end:
                self._is_written.set()
                return
        raise _cut()

    async def _read_in(self) -> None:
        """Send the connection's data by the stream, and then the end mark."""
        buffer = bytearray(CHUNK_BYTES)
        view = memoryview(buffer)
        while True:
            await _wait_room(self._stream)
            try:
                size = await self._loop.sock_recv_into(self._socket, buffer)
            except OSError as error:
                raise PipeCutError(reason_of(error), is_connection=True) from None
            if not size:
                break
            self.from_connection += size
            self._outgoing = size
            await self.send(_DATA_KEY + encode_varint(size) + view[:size] + _padding(size))
            self._outgoing = 0
        await self.send(_END_FIELD)
        self._is_read.set()

    async def send(self, message: bytes) -> None:
        """Send one message as the stream has room. Raises PipeCutError if the stream ends before."""
        await send_message(self._stream, message)


async def send_message(stream: ByteStream, message: bytes) -> None:
    """Send one message as the stream has room. Raises PipeCutError if the stream ends before."""
    rest = memoryview(framed(message))
    while rest:
        await _wait_room(stream)
        rest = rest[stream.send(rest) :]


async def _wait_room(stream: ByteStream) -> None:
    while not stream.room:
        if not stream.is_open:
            await stream.wait_ended()  # raises the reason
            raise _cut()
        room = asyncio.get_running_loop().create_future()
        stream.when_room(partial(_set, room))
        await room


def read_message(message: bytes) -> tuple[memoryview, bool]:
    """A message's data, and whether it is the last. Raises GRPCError."""
    data, is_end, pos = memoryview(b""), False, 0
    try:
        for _ in range(_MAX_FIELDS):
            if pos == len(message):
                return data, is_end
            number, wire_type, pos = read_key(message, pos)
            start, pos = value_bounds(message, pos, wire_type)
            if number == _DATA and wire_type == BYTES:
                data = memoryview(message)[start:pos]
            elif number == _END and wire_type == VARINT:
                is_end = bool(read_varint(message, start)[0])
            elif number in (_DATA, _END):
                raise MalformedWireError("a field has the wrong type")
    except MalformedWireError as error:
        raise GRPCError(Status.INVALID_ARGUMENT, f"a message is malformed: {error}") from None
    raise GRPCError(Status.INVALID_ARGUMENT, "a message has too many fields")


def close_with_reset(sock: socket.socket) -> None:
    """Close a connection with a reset, so that the other end sees a cut and not an orderly end."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


def _padding(size: int) -> bytes:
    """Padding that makes the frame of a short message long enough; empty for longer ones."""
    missing = _LEAST_BYTES - size
    return b"" if missing <= 0 else _PADDING_KEY + bytes([missing]) + bytes(missing)


def _set(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _cut() -> PipeCutError:
    return PipeCutError("the stream has ended", is_connection=False)
