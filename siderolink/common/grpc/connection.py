"""What the streams of one HTTP/2 connection share: grpclib's connection and stream, with bounds and a short way for bytes."""

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from grpclib.config import Configuration
from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import Connection as _GrpclibConnection
from grpclib.protocol import Stream as _GrpclibStream
from grpclib.utils import Wrapper
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.stream import StreamInputs

from siderolink.common.grpc import frames
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.messages import MessageBuffer, OnRefusal
from siderolink.common.grpc.refusals import Refusal

Headers = list[tuple[str, str]]

# Whole header blocks of an ordinary answer (RFC 7541): they need no table, so the engine's encoder need not know of them.
_ANSWER_HEADERS = b"\x88\x0f\x10\x16application/grpc+proto"
_ANSWER_STEPS = (StreamInputs.SEND_HEADERS, StreamInputs.SEND_DATA, StreamInputs.SEND_HEADERS, StreamInputs.SEND_END_STREAM)
_ANSWER_TRAILERS = b"\x00\x0bgrpc-status\x010"


class CorkedTransport(asyncio.Transport):
    """Joins what is written in one turn of the loop into one send."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._parts: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._parts:
            asyncio.get_running_loop().call_soon(self.flush)
        self._parts.append(bytes(data))

    def write_now(self, data: bytes) -> None:
        """Send what waits, and this behind it."""
        self._parts.append(data)
        self.flush()

    def flush(self) -> None:
        data = b"".join(self._parts)
        self._parts.clear()
        if data and not self._transport.is_closing():
            try:
                self._transport.write(data)
            except RuntimeError:
                pass  # uvloop's, which is closed without saying so when connecting was cancelled at the last moment

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return self._transport.get_extra_info(name, default)


class Sink(Protocol):
    """Who takes a stream's raw bytes."""

    def feed(self, pieces: Sequence[memoryview], *, flow: bool) -> None:
        """Take DATA; with `flow`, the sink gives the window back itself."""

    def ended(self) -> None:
        """The peer has sent all, or its trailers."""

    def terminated(self, reason: str) -> None:
        """The stream was reset or its connection is gone."""

    def wake(self) -> None:
        """There may be room to send again."""


class H2Stream(_GrpclibStream):
    """One stream; `sink` takes its bytes once it is raw."""

    sink: Sink | None = None
    connection: "Connection"
    buffer: MessageBuffer

    def init_stream(self, stream_id: int, connection: _GrpclibConnection) -> None:
        super().init_stream(stream_id, connection)
        owner = self.connection
        self.buffer = MessageBuffer(lambda size: owner.ack(stream_id, size), owner.limits.max_message_bytes, owner.on_refusal)

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        """Send all of it, or raise StreamTerminatedError when the peer leaves no room for it for `request_timeout`."""
        try:
            async with asyncio.timeout(self.connection.limits.request_timeout) as scope:
                await super().send_data(data, end_stream)
        except TimeoutError:
            if scope.expired():
                self.connection.on_refusal(Refusal.ANSWER_NOT_TAKEN, "the peer left no room for a message in time")
                self.abort(ErrorCodes.CANCEL)
                raise StreamTerminatedError("the peer left no room for a message in time") from None
            raise

    def put_headers(self, headers: Headers, *, end_stream: bool = False) -> None:
        """Send headers now, without waiting; nothing happens on a stream that is closed."""
        if not self.closable:
            return
        assert self.id is not None
        try:
            self._h2_connection.send_headers(self.id, headers, end_stream=end_stream)
        except ProtocolError:
            return
        self.connection.flush()
        self.connection.guard.sent_data()

    def abort(self, error_code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Reset the stream if it is not closed."""
        if self.closable:
            assert self.id is not None
            self._h2_connection.reset_stream(self.id, error_code=error_code)
            self.connection.flush()

    def __ended__(self) -> None:
        super().__ended__()
        if self.sink is not None:
            self.sink.ended()

    def __terminated__(self, reason: str) -> None:
        super().__terminated__(reason)
        self.buffer.settle()
        if self.sink is not None:
            self.sink.terminated(reason)


class Connection(_GrpclibConnection):
    """What all streams of a connection share."""

    def __init__(
        self, h2_connection: H2Connection, transport: asyncio.Transport, *, limits: Limits, server: bool, on_refusal: OnRefusal
    ) -> None:
        self._corked = CorkedTransport(transport)
        super().__init__(h2_connection, self._corked, config=grpclib_config(limits, server=server))
        self.limits = limits
        self.on_refusal = on_refusal
        self.guard = frames.FloodGuard(limits, asyncio.get_running_loop().time)
        self.scanner = frames.FrameScanner(limits, self.guard, server=server)
        self.sinks: dict[int, Sink] = {}
        self._unacknowledged = 0

    def create_stream(self, *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> H2Stream:
        return H2Stream(self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper)

    def ack(self, stream_id: int, size: int) -> None:
        if not self.is_closing():
            super().ack(stream_id, size)

    def flush(self) -> None:
        if not self.is_closing():
            super().flush()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.wake_sinks()

    def wake_sinks(self) -> None:
        for sink in tuple(self.sinks.values()):
            sink.wake()

    def add_sink(self, stream: H2Stream, sink: Sink) -> None:
        """From now on the bytes of `stream` go to `sink`."""
        assert stream.id is not None
        stream.sink = sink
        stream.buffer.settle()
        self.sinks[stream.id] = sink
        self.scanner.raw.add(stream.id)

    def drop_sink(self, stream_id: int) -> None:
        """Whatever still comes for this stream is the HTTP/2 engine's business again."""
        self.sinks.pop(stream_id, None)
        self.scanner.raw.discard(stream_id)

    def give_back(self, stream_id: int, size: int) -> None:
        """Tell the peer that it may send `size` more on the stream; the connection's share is told by halves of the window."""
        if self.is_closing() or not size:
            return
        self._unacknowledged += size
        updates = frames.window_update(stream_id, size) if stream_id in self._connection.streams else b""
        if self._unacknowledged >= self.limits.connection_window_bytes // 4:
            updates += frames.window_update(0, self._unacknowledged)
            self._unacknowledged = 0
        self._transport.write(updates)

    def room(self, stream_id: int) -> int:
        """How many bytes of DATA may be sent on the stream right now."""
        if self.is_closing() or not self.write_ready.is_set():
            return 0
        stream = self._connection.streams.get(stream_id)
        if stream is None or stream.closed:
            return 0
        return max(0, min(stream.outbound_flow_control_window, self._connection.outbound_flow_control_window))

    def put_data(self, stream_id: int, data: memoryview) -> None:
        """Send DATA that fits into `room`, in frames as long as the peer takes."""
        size = len(data)
        longest = min(self._connection.max_outbound_frame_size, self.limits.max_frame_bytes)
        parts: list[bytes | memoryview] = []
        for start in range(0, size, longest):
            piece = data[start : start + longest]
            parts.append(frames.frame_header(len(piece), frames.DATA, 0, stream_id))
            parts.append(piece)
        self._connection.streams[stream_id].outbound_flow_control_window -= size
        self._connection.outbound_flow_control_window -= size
        self.guard.sent_data(len(parts) // 2)
        self._corked.write_now(b"".join(parts))

    def put_answer(self, stream_id: int, message: bytes) -> bool:
        """Send a call's only message, headers and OK trailers in one write; False, and nothing sent, where that cannot be.

        It cannot without room, nor as the first answer since the peer asked for a smaller header table: the block that follows
        has to begin with the new size (RFC 7541, 4.2), and only the engine's encoder writes that.
        """
        size = len(message)
        if self._connection.encoder.table_size_changes:
            return False
        if size > min(self.room(stream_id), self._connection.max_outbound_frame_size):
            return False
        stream = self._connection.streams[stream_id]
        for step in _ANSWER_STEPS:
            stream.state_machine.process_input(step)
        stream.outbound_flow_control_window -= size
        self._connection.outbound_flow_control_window -= size
        self.flush()
        header, end = frames.frame_header, frames.END_HEADERS
        self._corked.write_now(
            header(len(_ANSWER_HEADERS), frames.HEADERS, end, stream_id)
            + _ANSWER_HEADERS
            + header(size, frames.DATA, 0, stream_id)
            + message
            + header(len(_ANSWER_TRAILERS), frames.HEADERS, end | frames.END_STREAM, stream_id)
            + _ANSWER_TRAILERS
        )
        self.guard.sent_data(3)
        return True

    def end_stream(self, stream_id: int) -> None:
        """Say that no more will be sent on the stream."""
        self._connection.end_stream(stream_id)
        self.flush()

    def data_send_process(self) -> None:
        super().data_send_process()
        self.guard.sent_data()

    def headers_send_process(self) -> None:
        super().headers_send_process()
        self.guard.sent_data()

    def say_goodbye(self, error_code: ErrorCodes, reason: str) -> None:
        """Send GOAWAY, if that can still be sent."""
        if self.is_closing():
            return
        try:
            self._connection.close_connection(error_code, additional_data=reason.encode())
        except ProtocolError:
            return
        self.flush()

    def ping(self) -> None:
        self._connection.ping(b"siderolk")
        self.flush()


@lru_cache(maxsize=8)
def grpclib_config(limits: Limits, *, server: bool) -> Configuration:
    # grpclib's own pings are off: it counts an answer only, where here anything heard shows that the peer lives
    config = Configuration(_keepalive_time=None, http2_connection_window_size=limits.connection_window_bytes)
    return config.__for_server__() if server else config.__for_client__()
