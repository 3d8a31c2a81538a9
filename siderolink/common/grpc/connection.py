"""State shared by the streams of one HTTP/2 connection: h2's engine, bounded versions of grpclib's classes, and raw streams."""

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

from grpclib.config import Configuration
from grpclib.exceptions import StreamTerminatedError
from grpclib.protocol import Connection as _GrpclibConnection
from grpclib.protocol import Peer
from grpclib.utils import Wrapper
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event
from h2.exceptions import DenialOfServiceError, FlowControlError, ProtocolError, TooManyStreamsError
from h2.settings import SettingCodes, Settings

from siderolink.common.grpc import frames, private
from siderolink.common.grpc.accounts import Account
from siderolink.common.grpc.header_fields import HEADER_ENCODING, Headers
from siderolink.common.grpc.limits import DEFAULT_WINDOW, Limits
from siderolink.common.grpc.messages import MessageBuffer, OnRefusal
from siderolink.common.grpc.outbound import CorkedTransport, Gate
from siderolink.common.grpc.raw_streams import RawStreams, Sink
from siderolink.common.grpc.refusals import PEER_FAULTS, Refusal, Refused
from siderolink.common.grpc.timers import Timers

_STREAM_HEADROOM = 4


class Engine(H2Connection):
    """h2's engine with a lower limit of remembered closed streams."""

    MAX_CLOSED_STREAMS = 1024


@lru_cache(maxsize=2)
def h2_config(*, server: bool) -> H2Configuration:
    return H2Configuration(
        client_side=not server,
        # Header fields are ASCII; other bytes must not raise in the middle of a frame. A server decodes them: header_fields.
        header_encoding=None if server else HEADER_ENCODING,
        validate_inbound_headers=not server,  # a server checks a request's fields itself: header_fields
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        normalize_inbound_headers=False,
    )


def new_h2_connection(limits: Limits, *, server: bool) -> Engine:
    """A new engine. It need not produce the preface, which is the same for all connections: see `connection_preface`."""
    connection = Engine(h2_config(server=server))
    if not server or not private.remember_requests(connection):
        connection.decoder = frames.HeaderDecoder()
    if server:
        private.expect_frames(connection)
    connection.local_settings = _local_settings(limits, server=server)
    connection.max_inbound_frame_size = limits.max_frame_bytes
    connection.decoder.max_header_list_size = limits.max_header_bytes
    if limits.connection_window_bytes > DEFAULT_WINDOW:
        private.open_window(connection, limits.connection_window_bytes - DEFAULT_WINDOW)
    return connection


@lru_cache(maxsize=8)
def _local_settings(limits: Limits, *, server: bool) -> Settings:
    """Shared by all engines with these limits: the settings never change, and the peer's acknowledgement has no effect."""
    settings = _settings(limits, server=server)
    if server:
        # The engine ends the whole connection when this limit is exceeded. It gets a higher limit than the peer, so that
        # calls opened before the peer has read our settings are refused one by one.
        settings[SettingCodes.MAX_CONCURRENT_STREAMS] *= _STREAM_HEADROOM
    return Settings(client=not server, initial_values=settings)


def _settings(limits: Limits, *, server: bool) -> dict[SettingCodes, int]:
    return {
        SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
        SettingCodes.MAX_FRAME_SIZE: limits.max_frame_bytes,
        SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
        (SettingCodes.MAX_CONCURRENT_STREAMS if server else SettingCodes.ENABLE_PUSH): limits.max_streams if server else 0,
    }


@lru_cache(maxsize=8)
def connection_preface(limits: Limits, *, server: bool) -> bytes:
    """The connection preface (RFC 9113, 3.4) of either side, including the initial connection window."""
    connection = H2Connection(h2_config(server=server))
    connection.local_settings = Settings(client=not server, initial_values=_settings(limits, server=server))
    connection.initiate_connection()
    more = limits.connection_window_bytes - DEFAULT_WINDOW
    return bytes(connection.data_to_send()) + (frames.window_update(0, more) if more else b"")


@lru_cache(maxsize=8)
def grpclib_config(connection_window: int, *, server: bool) -> Configuration:
    return private.grpclib_config(connection_window, server=server)


class H2Stream(private.NotifyingStream):
    """One stream; `sink` receives its bytes once it is raw."""

    sink: Sink | None = None
    connection: "Connection"
    buffer: MessageBuffer

    def __init__(self, connection: "Connection", *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> None:
        super().__init__(connection, connection.engine, connection.transport, stream_id=stream_id, wrapper=wrapper)

    def init_stream(self, stream_id: int, connection: _GrpclibConnection) -> None:
        """Like grpclib's, but without creating a buffer that is replaced immediately."""
        owner = self.connection
        self.id = stream_id
        owner.streams_started += 1
        self.created = owner.last_stream_created = time.monotonic()
        self.buffer = MessageBuffer(
            lambda size: owner.ack(stream_id, size),
            owner.limits.max_message_bytes,
            owner.refuse_call,
            owner.account,
            owner.timers,
            server=owner.is_server,
        )

    async def send_data(self, data: bytes, end_stream: bool = False) -> None:
        """Send all data. Raises StreamTerminatedError if the peer leaves no room for it for `request_timeout`."""
        try:
            async with asyncio.timeout(self.connection.limits.request_timeout) as scope:
                await super().send_data(data, end_stream)
        except TimeoutError:
            if scope.expired():
                self.connection.refuse_call(Refusal.ANSWER_NOT_TAKEN, "the peer did not open its flow-control window in time")
                self.abort(ErrorCodes.CANCEL)
                raise StreamTerminatedError("the peer did not open its flow-control window in time") from None
            raise

    def put_headers(self, headers: Headers, *, end_stream: bool = False) -> None:
        """Send headers now, without waiting. Does nothing on a closed stream."""
        if not self.closable:
            return
        assert self.id is not None
        try:
            self.connection.engine.send_headers(self.id, headers, end_stream=end_stream)
        except ProtocolError:
            return
        self.connection.flush()
        self.connection.guard.sent_data()

    def abort(self, error_code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Reset the stream unless it is closed."""
        if self.closable:
            assert self.id is not None
            self.connection.engine.reset_stream(self.id, error_code=error_code)
            self.connection.flush()
            self.connection.scanner.was_reset(self.id)

    def on_ended(self) -> None:
        if self.sink is not None:
            self.sink.ended()

    def on_terminated(self, reason: str) -> None:
        self.buffer.settle()
        self.window_updated.set()  # waiting senders wake up and find the stream or connection closed
        if self.sink is not None:
            self.sink.terminated(reason)


class Connection(_GrpclibConnection):
    """State shared by all streams of a connection. Does not read attributes that grpclib's close() deletes."""

    def __init__(
        self,
        engine: H2Connection,
        transport: asyncio.Transport,
        *,
        limits: Limits,
        server: bool,
        account: Account,
        timers: Timers,
        on_refusal: OnRefusal,
        on_flood: Callable[[Refused], None],
    ) -> None:
        self.engine = engine
        self.transport = CorkedTransport(transport, limits.max_unsent_bytes, self._overflow)
        super().__init__(engine, self.transport, config=grpclib_config(limits.connection_window_bytes, server=server))
        self.limits = limits
        self.is_server = server
        self.account = account
        self.timers = timers
        self.on_refusal = on_refusal
        self.guard = frames.FloodGuard(limits, asyncio.get_running_loop().time)
        self.scanner = frames.FrameScanner(limits, self.guard, server=server)
        self.write_ready = self._write_gate = Gate()
        self.write_ready.set()
        self.raw_streams = RawStreams(engine, self.transport, self._write_gate, self.scanner, limits)
        self.stream_close_waiter = self._stream_gate = Gate()
        self._on_flood: Callable[[Refused], None] | None = on_flood
        self._preface = connection_preface(limits, server=server)

    def create_stream(self, *, stream_id: int | None = None, wrapper: Wrapper | None = None) -> H2Stream:
        return H2Stream(self, stream_id=stream_id, wrapper=wrapper)

    def get_peer(self) -> Peer:
        return Peer(self.transport)

    def is_closing(self) -> bool:
        return self.transport.is_closing()

    def close(self) -> None:
        if self._write_gate.is_closed:
            return
        super().close()
        self._write_gate.close()
        self._stream_gate.close()

    def gone(self) -> None:
        """Drop all references to the lost transport."""
        self.close()
        self.transport.detach()
        self._on_flood = None
        self.account.close()

    def refuse_call(self, refusal: Refusal, message: str) -> None:
        """Count the refusal of a call; too many caused by the peer end the connection, like resets (CVE-2025-8671)."""
        self.on_refusal(refusal, message)
        if refusal in PEER_FAULTS:
            try:
                self.guard.count(Refusal.RESET_FLOOD)
            except Refused as refused:
                self._flood(refused)

    def receive(self, data: bytes, begun: Sequence[frames.FrameHeader]) -> list[Event]:
        """Feed a piece for the engine and send its responses. Raises Refused if the peer violates the protocol."""
        try:
            events = private.receive(self.engine, data, begun)
        except ProtocolError as error:
            raise Refused(_refusal_of(error), str(error) or type(error).__name__) from error
        answer = self.engine.data_to_send()
        if answer:
            self.transport.write(answer)
            for _ in range(frames.count_resets(answer)):
                self.guard.count(Refusal.RESET_FLOOD)
        self.raw_streams.check_window()
        return events

    def ack(self, stream_id: int, size: int) -> None:
        if size and not self.is_closing():
            self.engine.acknowledge_received_data(size, stream_id)
            self.flush()

    def begin(self) -> None:
        """Send the preface unless it was sent. A server sends its preface together with its answer to the peer's."""
        words, self._preface = self._preface, b""
        if words:
            self.transport.write(words)

    def flush(self) -> None:
        data = self.engine.data_to_send()
        if data:
            self.transport.write(data)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.raw_streams.wake()

    def add_sink(self, stream: H2Stream, sink: Sink) -> None:
        """Pass the bytes of `stream` to `sink` from now on."""
        assert stream.id is not None
        stream.sink = sink
        stream.buffer.settle()
        self.raw_streams.add(stream.id, sink)

    def put_answer(self, stream_id: int, message: bytes) -> bool:
        """Send headers, the only message and OK trailers in one write. Returns False, with nothing sent, if impossible."""
        if len(message) > min(self.raw_streams.room(stream_id), self.engine.max_outbound_frame_size):
            return False
        answer = private.short_answer(self.engine, stream_id, message)
        if answer is None:
            return False
        self.flush()
        self.transport.write_now(answer)
        self.guard.sent_data(3)
        return True

    def end_stream(self, stream_id: int) -> None:
        """Half-close the stream."""
        self.engine.end_stream(stream_id)
        self.flush()

    def data_send_process(self) -> None:
        super().data_send_process()
        self.guard.sent_data()

    def headers_send_process(self) -> None:
        super().headers_send_process()
        self.guard.sent_data()

    def say_goodbye(self, error_code: ErrorCodes, reason: str) -> None:
        """Send GOAWAY if it can still be sent."""
        if self.is_closing():
            return
        self.begin()
        try:
            self.engine.close_connection(error_code, additional_data=reason.encode())
        except ProtocolError:
            return
        self.flush()

    def ping(self) -> None:
        """Check whether the peer is alive."""
        if not self.is_closing():
            self.engine.ping(b"siderolk")
            self.flush()

    def _overflow(self) -> None:
        message = f"more than {self.limits.max_unsent_bytes} bytes are waiting for the peer (max_unsent_bytes)"
        self._flood(Refused(Refusal.ANSWER_NOT_TAKEN, message))

    def _flood(self, refused: Refused) -> None:
        if self._on_flood is not None:
            self._on_flood(refused)


def _refusal_of(error: ProtocolError) -> Refusal:
    if isinstance(error, TooManyStreamsError):
        return Refusal.TOO_MANY_STREAMS
    if isinstance(error, FlowControlError):
        return Refusal.FLOW_CONTROL
    if isinstance(error, DenialOfServiceError):
        return Refusal.HEADERS_TOO_LARGE
    return Refusal.PROTOCOL_ERROR
