"""Dispatches a connection's input to the HTTP/2 engine and to raw streams."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from siderolink.common.grpc import turns
from siderolink.common.grpc.connection import Connection
from siderolink.common.grpc.frames import FrameHeader, Piece
from siderolink.common.grpc.processor import Processor
from siderolink.common.grpc.refusals import Refusal, Refused

LONGEST_WAIT = 1.0
"""Maximum seconds that input waits before the source's account is asked again."""
_MOST_PIECES = 64
_MOST_BYTES = 1 << 18
"""Pieces, and bytes, of a raw stream that are delivered together; a longer piece is not divided."""
_FREE_BYTES = 4096
"""Size of a read that is not charged while it waits for its turn."""


class Input:
    """The input of one connection.

    On a server, input is processed in the turns of its source; a known source need not wait for its turn if that does not delay
    others. Raw streams of known sources, local processes, and clients never wait, but they also use at most `TURN_SECONDS` of
    one iteration of the loop.
    """

    def __init__(
        self,
        connection: Connection,
        processor: Processor,
        transport: asyncio.Transport,
        fail: Callable[[Exception], None],
    ) -> None:
        self.flooded: Refused | None = None
        """The reason why this connection is about to end; further input is ignored."""
        self._connection = connection
        self._processor = processor
        self._transport = transport
        self._timers = connection.timers
        self._fail = fail
        self._account = connection.account
        self._raw = connection.scanner.raw
        self._loop = asyncio.get_running_loop()
        self._pieces: Iterator[Piece] | None = None
        self._steps: Iterator[None] = iter(())
        """What is left of a stream's work on what was delivered to it."""
        self._held: tuple[Piece, ...] = ()
        """The piece that follows."""
        self._backlog: list[bytes] = []
        self._queued = 0
        self.is_paused = False
        """Whether reading is paused because earlier input waits for its turn."""
        self._engine_seconds = 0.0
        self._calls_charged = 0
        self._waiting = 0
        self._awaits_settings = True

    def feed(self, data: bytes) -> None:
        """Process received bytes, now or in a later turn. Errors are reported to `fail`."""
        if self._pieces is None:
            self._pieces = self._connection.scanner.feed(data)
            account = self._account
            if not account.takes_turns or (self._raw and not account.is_stranger):
                self._process_alone()
                return
            account.run_or_queue(self._process)
        else:
            self._backlog.append(data)
            self._pause()
        if len(data) > _FREE_BYTES and self._is_waiting:
            if not self._account.take(len(data)):
                self._fail(Refused(Refusal.CALL_MEMORY, "too much input waits for its turn (max_call_bytes)"))
            else:
                self._queued += len(data)

    def stop(self) -> None:
        """Stop processing; the connection is lost."""
        self._pieces = None
        self._steps, self._held = iter(()), ()
        self._backlog.clear()
        self.flooded = None
        self._fail = _ignore

    @property
    def _is_waiting(self) -> bool:
        return self._pieces is not None

    def _queue_input(self) -> None:
        if self._account.takes_turns:
            self._account.queue(self._process)
        else:
            self._loop.call_soon(self._process_alone)

    def _process_alone(self) -> None:
        self._process(self._loop.time() + turns.TURN_SECONDS)

    def _process(self, until: float) -> float:
        """Process input until then. Returns the estimated seconds of the calls that it started."""
        pieces, connection = self._pieces, self._connection
        if pieces is None or self._transport.is_closing():
            return 0.0
        is_over = True
        if self._awaits_settings:
            connection.begin()
        try:
            is_over = self._scan(pieces, until)
            if is_over:
                self._after_scan()
        except Exception as error:
            self._fail(error)
        if self._transport.is_closing():
            self._backlog.clear()
            return 0.0
        calls = connection.streams_started - self._calls_charged
        if is_over and not (calls or self._engine_seconds or self._backlog or self._queued or self.is_paused):
            self._pieces = None  # the most frequent case, bytes of a tunnel: the steps below would change nothing else
            return 0.0
        self._calls_charged += calls
        self._continue(is_over, self._charge(calls))
        return calls * turns.CALL_SECONDS

    def _charge(self, calls: int) -> float:
        """Charge the source for frames and calls; returns how long its input has to wait. Raw bytes are free."""
        seconds, self._engine_seconds = self._engine_seconds + calls * turns.CALL_SECONDS, 0.0
        return self._account.charge(seconds, self._loop.time()) if seconds else 0.0

    def _continue(self, is_over: bool, wait: float) -> None:
        """Continue in another turn, or when the source may use processor time again."""
        if is_over:
            self._pieces = None
            if self._backlog or wait or self._queued:
                self._process_backlog(wait)
        if self._pieces is None:
            if self.is_paused:
                self.is_paused = False
                self._transport.resume_reading()
            return
        if wait:
            self._pause()
            self._timers.after("read", min(wait, LONGEST_WAIT), self._queue_input)
        else:
            self._queue_input()

    def _process_backlog(self, wait: float) -> None:
        data = b"".join(self._backlog)
        self._backlog.clear()
        if data or wait:
            self._pieces = self._connection.scanner.feed(data)
        done = max(self._queued - len(data), 0)
        if done:
            self._account.give_back(done)
            self._queued -= done

    def _pause(self) -> None:
        if not self.is_paused and not self._transport.is_closing():
            self.is_paused = True
            self._transport.pause_reading()

    def _scan(self, pieces: Iterator[Piece], until: float) -> bool:
        """Dispatch each piece to its stream or the engine. Returns False if the turn ends before the pieces.

        Consecutive frames of a byte stream are delivered together.
        """
        raw = self._connection.raw_streams
        now = self._loop.time()
        if not self._work_on(until):
            return False
        held, self._held = self._held, ()
        sink_id = size = 0
        parts: list[memoryview] = []
        for stream_id, piece, begun in chain(held, pieces):
            if parts and (stream_id != sink_id or len(parts) >= _MOST_PIECES or size >= _MOST_BYTES):
                self._steps = raw.feed(sink_id, parts)
                parts, size = [], 0
                is_done, now = self._work_on(until), self._loop.time()
                if not is_done or now > until:
                    self._held = ((stream_id, piece, begun),)
                    return False
            if stream_id:
                sink_id = stream_id
                parts.append(piece)
                size += len(piece)
                continue
            if piece:
                self._feed(bytes(piece), begun)
                if self._transport.is_closing():
                    return True
            started, now = now, self._loop.time()
            self._engine_seconds += now - started
            if now > until:
                return False
        if not parts:
            return True
        self._steps = raw.feed(sink_id, parts)
        return self._work_on(until)

    def _work_on(self, until: float) -> bool:
        """Let a stream process what was delivered to it. Returns False if the turn ends before."""
        for _ in self._steps:
            if self._loop.time() > until:
                return False
        self._steps = iter(())
        return True

    def _feed(self, piece: bytes, begun: Sequence[FrameHeader]) -> None:
        for event in self._connection.receive(piece, begun):
            self._processor.process(event)
            if self.flooded is not None:
                raise self.flooded
        self._connection.flush()

    def _after_scan(self) -> None:
        """Send replies, and account for bytes that the scanner dropped or the engine holds."""
        connection = self._connection
        scanner = connection.scanner
        if scanner.replies:
            connection.flush()
            connection.transport.write(bytes(scanner.replies))
            scanner.replies.clear()
        if scanner.has_settings and self._awaits_settings:
            self._awaits_settings = False
            self._timers.stop("preface")
        if scanner.last_stream is not None:
            last_stream, scanner.last_stream = scanner.last_stream, None
            self._processor.leave(last_stream)
        if scanner.dropped:
            dropped, scanner.dropped = scanner.dropped, 0
            connection.raw_streams.received(dropped)
            connection.raw_streams.give_back(0, dropped)
        waiting = scanner.waiting
        if waiting != self._waiting:
            self._account.consumed(self._waiting)
            self._waiting = 0
            if not self._account.receive(waiting):
                raise Refused(Refusal.CALL_MEMORY, "unfinished frames use too much memory (max_call_bytes, max_received_bytes)")
            self._waiting = waiting


def _ignore(_: Exception) -> None:
    """Ignores errors of a lost connection."""
