"""One HTTP/2 connection of either side on asyncio: input, deadlines and closing."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import cast

import h2.events
from grpclib.protocol import AbstractHandler, EventsProcessor, H2Protocol
from grpclib.protocol import Stream as _GrpclibStream
from h2.errors import ErrorCodes

from siderolink.common.grpc.connection import Connection, H2Stream, grpclib_config, h2_config, new_h2_connection
from siderolink.common.grpc.limits import Account, Limits
from siderolink.common.grpc.messages import OnRefusal
from siderolink.common.grpc.refusals import ERROR_CODES, Refusal, Refused

log = logging.getLogger("siderolink")

WRITE_BUFFER_BYTES = 64 * 1024
"""Above this, what waits in the transport makes streams wait."""
NOTSENT_LOWAT_BYTES = 128 * 1024
"""Limit for unsent data in the kernel; the rest is queued here, where it can be dropped."""
_TIMER_GRAIN = 0.001
_TURN_SECONDS = 0.004
"""How long one connection's input may take of the event loop's turn before the others have theirs."""
_CALL_SECONDS = 0.0005
"""Approximate processor time of a call beyond its frames, charged when it starts."""
_LONGEST_WAIT = 1.0
_LOOK_EVERY = 64
"""Pieces of raw streams between two looks at the clock."""
CLOSE_SECONDS = 1.0
"""How long a closed connection may take to send its last words."""


def _nothing(*_: object) -> None:
    """Callback of a closed connection, which lets reference counting free it immediately."""


class Processor(EventsProcessor):
    """grpclib's dispatch of HTTP/2 events, which ignores what HTTP/2 says to ignore."""

    connection: Connection

    def __init__(self, handler: AbstractHandler, connection: Connection, on_streams: Callable[[int], None]) -> None:
        super().__init__(handler, connection)
        self._on_streams = on_streams

    def forget_owner(self) -> None:
        self._on_streams = _nothing

    def process(self, event: h2.events.Event) -> None:
        if event.__class__ in getattr(self, "processors", ()):
            super().process(event)

    def register(self, stream: _GrpclibStream) -> Callable[[], None]:
        release = super().register(stream)
        self._on_streams(len(self.streams))

        def release_stream() -> None:
            assert stream.id is not None
            self.connection.drop_sink(stream.id)
            release()
            released = cast("H2Stream", stream)
            released.sink = None  # it leads back to the stream
            released.buffer.release()
            self._on_streams(len(self.streams))

        return release_stream

    def process_request_received(self, event: h2.events.RequestReceived) -> None:
        if len(self.streams) < self.connection.limits.max_streams:
            super().process_request_received(event)
            return
        message = f"more than {self.connection.limits.max_streams} calls at a time"
        self.connection.create_stream(stream_id=event.stream_id).abort(ErrorCodes.REFUSED_STREAM)
        self.connection.refuse_call(Refusal.TOO_MANY_STREAMS, message)

    def process_data_received(self, event: h2.events.DataReceived) -> None:
        assert event.stream_id is not None
        sink = self.connection.sinks.get(event.stream_id)
        if sink is None:
            super().process_data_received(event)
            return
        sink.feed([memoryview(event.data or b"")], flow=False)
        self.connection.ack(event.stream_id, event.flow_controlled_length or 0)

    def process_window_updated(self, event: h2.events.WindowUpdated) -> None:
        super().process_window_updated(event)
        if event.stream_id == 0:
            self.connection.wake_sinks()
        elif event.stream_id in self.connection.sinks:
            self.connection.sinks[event.stream_id].wake()

    def process_remote_settings_changed(self, event: h2.events.RemoteSettingsChanged) -> None:
        super().process_remote_settings_changed(event)
        self.connection.wake_sinks()


class Http2Protocol(H2Protocol):
    """The asyncio protocol of either side.

    Peer input never makes it raise. An unexpected exception is an internal error: it is logged with its traceback and ends
    only this connection.
    """

    connection: Connection
    processor: Processor

    def __init__(
        self,
        handler: AbstractHandler,
        limits: Limits,
        *,
        server: bool,
        on_refusal: OnRefusal,
        on_lost: Callable[[], None] = _nothing,
        account: Account | None = None,
    ) -> None:
        super().__init__(handler, grpclib_config(limits, server=server), h2_config(server=server))
        self._limits = limits
        self._server = server
        self._on_refusal = on_refusal
        self._on_lost = on_lost
        self.was_made = False
        """Whether the connection, the TLS handshake included, ever stood."""
        self.lost = asyncio.Event()
        """Set once the connection is gone."""
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._account = account
        self._input: Iterator[tuple[int, memoryview]] | None = None
        self._backlog: list[bytes] = []
        self._is_paused = False
        self._engine_seconds = 0.0
        self._calls_charged = 0
        self._waiting = 0
        self._flooded: Refused | None = None
        self._heard_at = self._loop.time()
        self._ping_sent = False
        self._due: dict[str, tuple[float, Callable[..., None], tuple[object, ...]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.was_made = True
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if not self._server:  # a server's connections inherit them from the socket that listens
            tune(transport.get_extra_info("socket"), self._limits)
        self.connection = Connection(
            new_h2_connection(self._limits, server=self._server),
            self._transport,
            limits=self._limits,
            server=self._server,
            account=self._account or Account(self._limits),
            on_refusal=self._on_refusal,
            on_flood=self._flood,
        )
        self.processor = Processor(self.handler, self.connection, self._on_streams)
        if not self._server:
            self.connection.begin()
        self._after("preface", self._limits.preface_timeout, self._preface_late)
        interval = self._limits.server_ping_interval if self._server else self._limits.client_ping_interval
        if interval is not None:
            self._after("ping", interval, self._check_silence, interval)
        self._on_streams(0)

    def data_received(self, data: bytes) -> None:
        if self._is_done():
            return
        self._heard_at = self._loop.time()
        self.connection.begin()
        if self._input is None:
            self._input = self.connection.scanner.feed(data)
            self._read_on()
        else:
            self._backlog.append(data)

    def _read_on(self) -> None:
        """Deal with what came. When that takes long, the rest waits for the loop's next turn."""
        pieces = self._input
        if pieces is None or self._is_done():
            return
        try:
            is_over = self._scan(pieces)
            if is_over:
                self._after_scan()
        except Exception as error:
            self._fail(error)
        if self._is_done():
            self._backlog.clear()
            return
        self._schedule(is_over, self._charge())

    def _schedule(self, is_over: bool, wait: float) -> None:
        """Continue reading now, in the next turn, or when the source may use processor time again."""
        assert self._transport is not None
        if is_over:
            self._input = None
            if self._backlog or wait:
                data = b"".join(self._backlog)
                self._backlog.clear()
                self._input = self.connection.scanner.feed(data)
        if self._input is None:
            if self._is_paused:
                self._is_paused = False
                self._transport.resume_reading()
            return
        if not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        if wait:
            self._after("read", min(wait, _LONGEST_WAIT), self._read_on)
        else:
            self._loop.call_soon(self._read_on)

    def _charge(self) -> float:
        """Charge the source for what its frames and calls took; returns how long its input has to wait. Raw bytes are free."""
        calls, self._calls_charged = self.connection.streams_started - self._calls_charged, self.connection.streams_started
        seconds, self._engine_seconds = self._engine_seconds + calls * _CALL_SECONDS, 0.0
        return self.connection.account.charge(seconds, self._loop.time()) if seconds else 0.0

    def _fail(self, error: Exception) -> None:
        """End the connection for what the peer did, or for an error of ours."""
        if isinstance(error, Refused):
            self.refuse(error.refusal, error.message)
        else:
            log.error("an API connection failed because of an internal error", exc_info=error)
            self.refuse(Refusal.INTERNAL_ERROR, "an error of this program; see the log")

    def _guarded(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception as error:
            self._fail(error)

    def _scan(self, pieces: Iterator[tuple[int, memoryview]]) -> bool:
        """Dispatch each piece to its stream or the engine. Returns False if the turn ends before the pieces.

        Consecutive frames of a byte stream are delivered together.
        """
        now = self._loop.time()
        until = now + _TURN_SECONDS
        sink_id = 0
        parts: list[memoryview] = []
        for stream_id, piece in pieces:
            if parts and (stream_id != sink_id or len(parts) >= _LOOK_EVERY):
                self._feed_sink(sink_id, parts)
                parts = []
                now = self._loop.time()
                if stream_id and now > until:
                    self._feed_sink(stream_id, [piece])
                    return False
            if stream_id:
                sink_id = stream_id
                parts.append(piece)
                continue
            if piece:
                self._feed(bytes(piece))
                if self._is_done():
                    return True
            started, now = now, self._loop.time()
            self._engine_seconds += now - started
            if now > until:
                return False
        if parts:
            self._feed_sink(sink_id, parts)
        return True

    def _after_scan(self) -> None:
        """Answer, and count what the scanner has dropped and what the engine keeps."""
        scanner = self.connection.scanner
        if scanner.replies:
            self.connection.flush()
            self.connection.transport.write(bytes(scanner.replies))
            scanner.replies.clear()
        if scanner.has_settings and "preface" in self._due:
            self._stop("preface")
        if scanner.dropped:
            dropped, scanner.dropped = scanner.dropped, 0
            self.connection.received(dropped)
            self.connection.give_back(0, dropped)
        waiting = scanner.waiting
        if waiting != self._waiting:
            account = self.connection.account
            account.consumed(self._waiting)
            self._waiting = 0
            if not account.receive(waiting):
                raise Refused(Refusal.CALL_MEMORY, "unfinished frames use too much memory (max_call_bytes, max_received_bytes)")
            self._waiting = waiting

    def _feed_sink(self, stream_id: int, pieces: list[memoryview]) -> None:
        size = sum(map(len, pieces))
        self.connection.received(size)
        sink = self.connection.sinks.get(stream_id)
        if sink is not None:
            sink.feed(pieces, flow=True)
        else:  # this side ended the stream in the middle of the frame
            self.connection.give_back(stream_id, size)

    def _feed(self, piece: bytes) -> None:
        for event in self.connection.feed(piece):
            self.processor.process(event)
            if self._flooded is not None:
                raise self._flooded
        self.connection.flush()

    def _flood(self, refused: Refused) -> None:
        """Too much was refused by this peer's fault. Its connection ends soon: a caller may be in the midst of it."""
        if self._flooded is None:
            self._flooded = refused
            self._loop.call_soon(self.refuse, refused.refusal, refused.message)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._after("unread", self._limits.unread_timeout, self._unread)

    def resume_writing(self) -> None:
        self._stop("unread")
        self._guarded(super().resume_writing)

    def _unread(self) -> None:
        self.refuse(
            Refusal.ANSWER_NOT_TAKEN, f"what was sent stayed unread for {self._limits.unread_timeout:g} s (unread_timeout)"
        )
        self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_all()
        self._input = None
        if self.was_made:
            self._guarded(super().connection_lost, exc)
            self.processor.forget_owner()
            self.connection.gone()
        self._transport = None
        self.lost.set()
        on_lost, self._on_lost = self._on_lost, _nothing
        on_lost()

    def eof_received(self) -> None:
        """A peer that half-closes TCP is done."""

    def refuse(self, refusal: Refusal, message: str) -> None:
        """End the connection, saying why as far as HTTP/2 can."""
        if not self._is_done():
            self._on_refusal(refusal, message)
            self.close(ERROR_CODES.get(refusal, ErrorCodes.PROTOCOL_ERROR), refusal.value)

    def close(self, error_code: ErrorCodes = ErrorCodes.NO_ERROR, reason: str = "") -> None:
        """Say GOAWAY and close; a peer that does not take it is cut off after a second."""
        transport = self._transport
        if transport is None:
            return
        self.connection.say_goodbye(error_code, reason)
        self._stop_all()
        self.processor.close(f"the connection was closed: {reason}" if reason else "the connection was closed")
        self._after("close", CLOSE_SECONDS, transport.abort)

    def abort(self) -> None:
        """Cut the connection off now."""
        if self._transport is not None:
            self._transport.abort()

    def _is_done(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def _on_streams(self, count: int) -> None:
        if self._is_done():
            return
        if count:
            self._stop("idle")
        elif self._server:
            self._after("idle", self._limits.connection_idle_timeout, self._idle)

    def _idle(self) -> None:
        self.refuse(Refusal.CONNECTION_IDLE, f"no call for {self._limits.connection_idle_timeout:g} s")

    def _preface_late(self) -> None:
        self.refuse(Refusal.PREFACE_TIMEOUT, f"no HTTP/2 settings within {self._limits.preface_timeout:g} s")

    def _check_silence(self, interval: float) -> None:
        silence = self._loop.time() - self._heard_at
        if silence < interval:
            self._after("ping", interval - silence, self._check_silence, interval)
        elif self.connection.scanner.has_settings and (self._server or self.processor.streams):
            self.connection.ping()
            self._after("ping", self._limits.ping_timeout, self._check_pong, interval, self._loop.time())
        else:
            self._after("ping", interval, self._check_silence, interval)

    def _check_pong(self, interval: float, asked_at: float) -> None:
        if self._heard_at < asked_at:
            self.refuse(Refusal.PING_TIMEOUT, f"no answer to a ping within {self._limits.ping_timeout:g} s")
        else:
            self._check_silence(interval)

    def _after(self, name: str, seconds: float, callback: Callable[..., None], *args: object) -> None:
        """Call back once, unless stopped. One timer serves all names: it may be early, never late."""
        at = self._loop.time() + seconds
        self._due[name] = (at, callback, args)
        if self._timer is None or at < self._timer_at:
            self._arm(at)

    def _stop(self, name: str) -> None:
        self._due.pop(name, None)

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        now = self._loop.time() + _TIMER_GRAIN
        for name, (at, callback, args) in tuple(self._due.items()):
            if at <= now and name in self._due:
                del self._due[name]
                self._guarded(callback, *args)
        if self._due and self._timer is None:
            self._arm(min(at for at, _, _ in self._due.values()))

    def _stop_all(self) -> None:
        self._due.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def tune(sock: socket.socket | None, limits: Limits) -> None:
    """Set what our TCP connections have in common; on Linux those accepted have it from the socket that listens."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):  # the peer may be gone already
        _set_options(sock, limits)


def _set_options(sock: socket.socket, limits: Limits) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.tcp_keepalive_idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.tcp_keepalive_interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, (limits.tcp_keepalive_idle + 3 * limits.tcp_keepalive_interval) * 1000
    )
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
