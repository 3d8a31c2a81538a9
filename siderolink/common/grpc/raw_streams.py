"""Streams whose bytes bypass the HTTP/2 engine: their windows and DATA frames."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from h2.connection import H2Connection
from h2.exceptions import ProtocolError

from siderolink.common.grpc import frames, private
from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.outbound import CorkedTransport, Gate
from siderolink.common.grpc.refusals import Refusal, Refused


class Sink(Protocol):
    """The consumer of a stream's raw bytes."""

    def feed(self, pieces: Sequence[memoryview], *, flow: bool) -> Iterator[None]:
        """Receive DATA, which is processed as the result is iterated. With `flow`, the sink returns the window itself.

        Other work may be done in between, but nothing may be fed until the iteration has ended.
        """

    def ended(self) -> None:
        """The peer has half-closed the stream, or sent trailers."""

    def terminated(self, reason: str) -> None:
        """The stream was reset, or its connection was lost."""

    def wake(self) -> None:
        """There may be room to send again."""


class RawStreams:
    """The raw streams of one connection, by their ids."""

    def __init__(
        self, engine: H2Connection, transport: CorkedTransport, write_gate: Gate, scanner: frames.FrameScanner, limits: Limits
    ) -> None:
        self.sinks: dict[int, Sink] = {}
        self._ids = scanner.raw
        self._engine = engine
        self._transport = transport
        self._write_gate = write_gate
        self._guard = scanner.guard
        self._longest = limits.max_frame_bytes
        self._update_from = limits.connection_window_bytes // 4
        self._unacknowledged = 0
        self._outstanding = 0

    def add(self, stream_id: int, sink: Sink) -> None:
        """Pass the bytes of the stream to `sink` from now on."""
        self.sinks[stream_id] = sink
        self._ids.add(stream_id)

    def drop(self, stream_id: int) -> None:
        """Pass further data of this stream to the HTTP/2 engine again."""
        self.sinks.pop(stream_id, None)
        self._ids.discard(stream_id)

    def wake(self) -> None:
        """Notify all raw streams that there may be room again."""
        for sink in tuple(self.sinks.values()):
            sink.wake()

    def feed(self, stream_id: int, pieces: list[memoryview]) -> Iterator[None]:
        """Deliver DATA that bypassed the engine: see `Sink`. Raises Refused if it exceeds the connection's window."""
        size = sum(map(len, pieces))
        self.received(size)
        sink = self.sinks.get(stream_id)
        if sink is not None:
            return sink.feed(pieces, flow=True)
        self.give_back(stream_id, size)  # this side ended the stream in the middle of the frame
        return iter(())

    def received(self, size: int) -> None:
        """Count DATA that bypassed the engine. Raises Refused if it exceeds the connection's window."""
        self._outstanding += size
        self.check_window()

    def check_window(self) -> None:
        """Raises Refused if the peer exceeded the connection's window, counting all its data."""
        if self._outstanding and self._outstanding > self._engine.inbound_flow_control_window:
            raise Refused(Refusal.FLOW_CONTROL, "more data than the connection's window allows")

    def give_back(self, stream_id: int, size: int) -> None:
        """Return `size` bytes of flow-control window for data that bypassed the engine.

        Immediately for the stream, if it is open; in quarters of the window for the connection.
        """
        self.credit_stream(stream_id, size)
        self.credit_connection(size)

    def credit_stream(self, stream_id: int, size: int) -> None:
        """Return window of the stream, if it is open."""
        if size and stream_id in self.sinks and not self._transport.is_closing():
            self._transport.write(frames.window_update(stream_id, size))

    def credit_connection(self, size: int) -> None:
        """Return window of the connection, in quarters of it."""
        if self._transport.is_closing() or not size:
            return
        self._unacknowledged += size
        if self._unacknowledged >= self._update_from:
            self._transport.write(frames.window_update(0, self._unacknowledged))
            self._outstanding -= self._unacknowledged
            self._unacknowledged = 0

    def room(self, stream_id: int) -> int:
        """How many bytes of DATA may be sent on the stream now."""
        if self._transport.is_closing() or not self._write_gate.is_set():
            return 0
        try:
            return max(0, self._engine.local_flow_control_window(stream_id))
        except ProtocolError:
            return 0

    def send(self, stream_id: int, data: memoryview) -> None:
        """Send DATA that fits into `room`, in frames as long as the peer accepts."""
        longest = min(self._engine.max_outbound_frame_size, self._longest)
        if not private.spend_window(self._engine, stream_id, len(data)):
            self._send_by_engine(stream_id, data, longest)
            return
        parts: list[bytes | memoryview] = []
        while len(data) > longest:
            parts += frames.frame_header(longest, frames.DATA, 0, stream_id), data[:longest]
            data = data[longest:]
        parts += frames.frame_header(len(data), frames.DATA, 0, stream_id), data
        self._guard.sent_data(len(parts) // 2)
        self._transport.write_now(b"".join(parts))

    def _send_by_engine(self, stream_id: int, data: memoryview, longest: int) -> None:
        pieces = [data[start : start + longest] for start in range(0, len(data), longest)]
        try:
            for piece in pieces:
                self._engine.send_data(stream_id, bytes(piece))
        except ProtocolError:
            pass  # the stream was reset; its end is the next event
        self._guard.sent_data(len(pieces))
        self._transport.write_now(self._engine.data_to_send())
