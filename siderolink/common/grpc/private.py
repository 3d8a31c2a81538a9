"""All uses of non-public names of h2, hpack and grpclib, and nothing else.

grpclib is pinned to one version. h2 and hpack may be any version that grpclib allows, so their internals are only used for
shortcuts. These are compared once per process with h2's own behaviour; if one is missing or behaves differently, only the
public API is used. Together the shortcuts are worth 1.2 times the joins per second, measured in turns.
"""

import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.encoding.base import CodecBase
from grpclib.events import _DispatchServerEvents
from grpclib.exceptions import GRPCError, ProtocolError
from grpclib.protocol import EventsProcessor, H2Protocol, Peer
from grpclib.protocol import Stream as GrpclibH2Stream
from grpclib.server import Stream
from h2.connection import ConnectionInputs, ConnectionState, H2Connection
from h2.events import Event, WindowUpdated
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.stream import H2Stream, StreamClosedBy, StreamInputs, StreamState
from hpack import HeaderTuple

from siderolink.common.grpc import frames
from siderolink.common.grpc.header_fields import PLAIN_NAMES
from siderolink.common.grpc.refusals import Refusal

NO_LISTENERS = _DispatchServerEvents()
"""No listeners for a call's events."""

# Header blocks of an ordinary answer (RFC 7541). They do not use the dynamic table, so h2's encoder is not involved.
_ANSWER_HEADERS = b"\x88\x0f\x10\x16application/grpc+proto"
_ANSWER_TRAILERS = b"\x00\x0bgrpc-status\x010"
ANSWER_STEPS = (StreamInputs.SEND_HEADERS, StreamInputs.SEND_DATA, StreamInputs.SEND_HEADERS, StreamInputs.SEND_END_STREAM)

_NO_MESSAGE = "the call has no request message"
_LARGEST_WINDOW = 2**31 - 1
_NO_FLAGS: frozenset[str] = frozenset()
_END_STREAM = frozenset(("END_STREAM",))
_TAKES_DATA = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)
_TAKES_WINDOW = (*_TAKES_DATA, StreamState.HALF_CLOSED_REMOTE)


def grpclib_config(connection_window: int, *, server: bool) -> Configuration:
    """grpclib's configuration without its own pings, which accept only a PING answer although any byte shows a live peer."""
    config = Configuration(_keepalive_time=None, http2_connection_window_size=connection_window)
    return config.__for_server__() if server else config.__for_client__()


class ConnectingChannel(Channel):
    """grpclib's client; a subclass opens and checks its connections."""

    def __init__(
        self, host: str | None, port: int | None, *, path: str | None, tls: ssl.SSLContext | None, codec: CodecBase
    ) -> None:
        super().__init__(host, port, path=path, ssl=tls, codec=codec)
        self.host, self.port, self.path = self._host, self._port, path
        self.tls = tls
        self.scheme = self._scheme

    @property
    def authority(self) -> str:
        """The host named in requests."""
        return self._authority

    @authority.setter
    def authority(self, authority: str) -> None:
        self._authority = authority

    async def open_connection(self) -> H2Protocol:
        """Open a new connection."""
        raise NotImplementedError

    def check_connection(self, protocol: H2Protocol) -> None:
        """Raises if no call can use the connection."""

    async def connected(self) -> H2Protocol:
        """The existing connection, or a new one."""
        return await self.__connect__()

    async def _create_connection(self) -> H2Protocol:
        return await self.open_connection()

    async def __connect__(self) -> H2Protocol:
        protocol = await super().__connect__()
        self.check_connection(protocol)
        return protocol


class NotifyingStream(GrpclibH2Stream):
    """grpclib's stream with callbacks at its end. Only the first end counts: a connection that is closed is then lost, too."""

    _is_terminated = False

    def on_ended(self) -> None:
        """The peer has half-closed the stream."""

    def on_terminated(self, reason: str) -> None:
        """The stream was reset, or its connection was lost."""

    def __ended__(self) -> None:
        super().__ended__()
        self.on_ended()

    def __terminated__(self, reason: str) -> None:
        if not self._is_terminated:
            self._is_terminated = True
            super().__terminated__(reason)
            self.on_terminated(reason)


def terminate(stream: GrpclibH2Stream, reason: str) -> None:
    """End a stream that the peer will not process."""
    stream.__terminated__(reason)


async def send_request(
    stream: GrpclibH2Stream, headers: list[tuple[str, str]], processor: EventsProcessor
) -> Callable[[], None]:
    """Begin a call; returns a function that releases its stream."""
    return await stream.send_request(headers, _processor=processor)


class CallPeer(Peer):
    """grpclib's view of the other end, with the caller's effective address."""

    def __init__(self, peer: Peer, address: object) -> None:
        super().__init__(peer._transport)
        self._address = address

    def addr(self) -> Any:
        return self._address

    @property
    def certificate(self) -> bytes | None:
        """The other end's certificate, verified by TLS, as DER; None without one."""
        tls = self._transport.get_extra_info("ssl_object")
        return None if tls is None else tls.getpeercert(binary_form=True)


class Call(Stream[Any, Any]):
    """grpclib's view of a call, whose trailers are sent by the caller of the handler.

    The only message of an answer is held until the handler has returned, and then sent together with headers and trailers.
    """

    on_valid_token: Callable[[], None]
    wait_turn: Callable[[], Awaitable[None]]
    """Awaited between two messages, so that a handler that never blocks yields to others."""
    path: str = ""
    """The requested method as sent by the caller."""
    _answer: object = None

    async def recv_message(self) -> Any:
        if self._messages_received:
            await self.wait_turn()
        elif not self._cardinality.client_streaming:
            message = self._stream.buffer.take_message()  # type: ignore[attr-defined] # our streams have a MessageBuffer
            if message is not None:
                self._messages_received += 1
                return self._codec.decode(message, self._recv_type)
        found = await super().recv_message()
        if found is None and not self._cardinality.client_streaming:
            # generated handlers assert that there is a message
            self._stream.connection.refuse_call(Refusal.MESSAGE_MALFORMED, _NO_MESSAGE)  # type: ignore[attr-defined] # ours
            raise GRPCError(Status.INVALID_ARGUMENT, _NO_MESSAGE)
        return found

    async def send_message(self, message: Any) -> None:
        if self._cardinality.server_streaming or self._send_initial_metadata_done:
            await super().send_message(message)
        elif self._send_message_done:
            raise ProtocolError("the call was already answered")
        else:
            self._answer, self._send_message_done = message, True

    def waiting_answer(self) -> bytes | None:
        """The encoded message waiting to be sent, if any."""
        if self._answer is None or self.trailers_sent:
            return None
        return self._codec.encode(self._answer, self._send_type)

    def answered(self) -> None:
        """Mark headers, message and trailers as sent."""
        self._send_initial_metadata_done = self._send_trailing_metadata_done = True

    async def send_waiting(self) -> None:
        """Send the waiting message through grpclib."""
        answer, self._send_message_done = self._answer, False
        await super().send_message(answer)

    @property
    def headers_sent(self) -> bool:
        return self._send_initial_metadata_done

    @property
    def message_sent(self) -> bool:
        return self._send_message_done

    @property
    def trailers_sent(self) -> bool:
        return self._send_trailing_metadata_done or self._cancel_done


class _PlainFrame(NamedTuple):
    """The parts of an unpadded, complete HEADERS or DATA frame that h2 reads."""

    stream_id: int
    data: bytes
    flags: frozenset[str]

    @property
    def flow_controlled_length(self) -> int:
        return len(self.data)


class _PlainGoAway(NamedTuple):
    """The same for a GOAWAY frame."""

    last_stream_id: int
    error_code: int
    additional_data: bytes


def expect_frames(engine: H2Connection) -> None:
    """Let a server's new engine expect frames: the preface is read in front of it."""
    if has_shortcuts():
        expect_frames_past_h2(engine)
    else:
        engine.receive_data(frames.PREFACE)


def expect_frames_past_h2(engine: H2Connection) -> None:
    """The shortcut of `expect_frames`."""
    engine.incoming_buffer._preamble_len = 0


def receive(engine: H2Connection, data: bytes, begun: Sequence[frames.FrameHeader]) -> list[Event]:
    """Like h2's `receive_data`, without creating hyperframe's objects for plain frames.

    `begun` are the headers of the frames that begin in the data.
    """
    return receive_by_shortcut(engine, data, begun) if has_shortcuts() else engine.receive_data(data)


def receive_by_shortcut(engine: H2Connection, data: bytes, begun: Sequence[frames.FrameHeader]) -> list[Event]:
    """The shortcut of `receive`."""
    events: list[Event] = []
    waiting = engine.incoming_buffer
    if waiting._preamble_len or waiting._data or waiting._headers_buffer:
        return engine.receive_data(data)
    done = 0
    for _, kind, flags, stream_id, length in begun:
        start = done + frames.FRAME_HEADER_BYTES
        if start + length > len(data) or length > engine.max_inbound_frame_size:
            break
        frame = _PlainFrame(stream_id, data[start : start + length], _END_STREAM if flags & frames.END_STREAM else _NO_FLAGS)
        found = _receive_plain(engine, kind, flags, frame)
        if found is None:
            break
        events += found
        done = start + length
    return events + engine.receive_data(data[done:]) if done < len(data) else events


def _receive_plain(engine: H2Connection, kind: int, flags: int, frame: _PlainFrame) -> list[Event] | None:
    """The events of a plain frame; None for any other frame."""
    if engine.state_machine.state is ConnectionState.CLOSED:
        return None
    if kind == frames.WINDOW_UPDATE and len(frame.data) == 4:
        return _receive_window_update(engine, frame.stream_id, int.from_bytes(frame.data))
    received: _PlainFrame | _PlainGoAway = frame
    handle: Any  # our frames have the attributes of h2's own that are used
    if kind == frames.HEADERS:
        is_new = frame.stream_id & 1 and frame.stream_id > engine.highest_inbound_stream_id
        if flags & ~frames.END_STREAM != frames.END_HEADERS or engine.config.client_side or not is_new:
            return None
        handle = engine._receive_headers_frame
    elif kind == frames.DATA:
        stream = engine.streams.get(frame.stream_id)
        if stream is None or flags & ~frames.END_STREAM or stream.state_machine.state not in _TAKES_DATA:
            return None
        handle = engine._receive_data_frame
    elif kind == frames.GOAWAY and not frame.stream_id and len(frame.data) >= 8:
        handle = engine._receive_goaway_frame
        last, code = frames.GOAWAY_FIELDS.unpack_from(frame.data)
        received = _PlainGoAway(last & _LARGEST_WINDOW, code, frame.data[frames.GOAWAY_FIELDS.size :])
    else:
        return None
    events: list[Event]
    try:
        answer, events = handle(received)
    except H2ProtocolError as error:
        engine._terminate_connection(error.error_code)
        raise
    engine._prepare_for_sending(answer)
    return events


def _receive_window_update(engine: H2Connection, stream_id: int, delta: int) -> list[Event] | None:
    """The event of more window on the connection or an open stream; None if h2 must process the frame."""
    widened = engine.streams.get(stream_id) if stream_id else engine
    if widened is None or not 0 < delta <= _LARGEST_WINDOW - widened.outbound_flow_control_window:
        return None
    if isinstance(widened, H2Stream) and widened.state_machine.state not in _TAKES_WINDOW:
        return None
    engine.state_machine.process_input(ConnectionInputs.RECV_WINDOW_UPDATE)
    widened.outbound_flow_control_window += delta
    return [WindowUpdated(stream_id=stream_id, delta=delta)]


_MOST_BEGINNINGS = 16
_MOST_FIELDS = 12
_LONGEST_BEGINNING = 512


_NEW_NAMES = (0x00, 0x10, 0x40)
"""First bytes of fields whose names are given in full (RFC 7541, 6.2)."""
_TIMEOUT_NAME = b"\x89\x9a\xca\xc8\xb2\x4d\x49\x4f\x6a\x7f"
_PLAIN_TIMEOUT_NAME = b"\x0cgrpc-timeout"
"""The same name with and without the Huffman code, on which hpack spends more time than on all else of a block whose beginning
is known. Its value differs from call to call.
"""


class Beginning(NamedTuple):
    """The beginning of a connection's first header block, up to its first field that is not plain, and the resulting state."""

    block: bytes
    headers: tuple[HeaderTuple, ...]
    headers_size: int
    """As counted for the header list limit (RFC 9113, 6.5.2)."""
    entries: tuple[Any, ...]
    """The resulting dynamic table, newest entry first."""
    entries_size: int


_beginnings: list[Beginning] = []
"""Most recently used first."""


class RequestDecoder(frames.HeaderDecoder):
    """hpack's decoder. Decodes a beginning common to many connections only once, and restores the table that it leads to."""

    _is_new = True
    _ends: list[tuple[int, tuple[Any, ...], int]] | None = None

    def __init__(self, max_header_list_size: int, beginnings: list[Beginning]) -> None:
        super().__init__(max_header_list_size)
        self._beginnings = beginnings

    def decode(self, data: bytes, raw: bool = False) -> Any:
        if not self._is_new or not raw:
            return super().decode(data, raw)
        self._is_new = False
        beginnings = self._beginnings
        for number, known in enumerate(beginnings):
            if data.startswith(known.block):
                if number:
                    beginnings.insert(0, beginnings.pop(number))
                return self._decode_rest(known, data)
        return self._learn(data)

    def _decode_rest(self, known: Beginning, data: bytes) -> Any:
        rest, longest = data[len(known.block) :], self.max_header_list_size
        # A change of the table size is only valid at the beginning of a block: let the decoder check it.
        if known.headers_size > longest or (rest and rest[0] >> 5 == 1):
            return super().decode(data, True)
        self.header_table.dynamic_entries.extend(known.entries)
        self.header_table._current_size = known.entries_size
        if not rest:
            return list(known.headers)
        self.max_header_list_size = longest - known.headers_size
        if rest.startswith(_TIMEOUT_NAME, 1) and rest[0] in _NEW_NAMES:
            rest = rest[:1] + _PLAIN_TIMEOUT_NAME + rest[1 + len(_TIMEOUT_NAME) :]
        try:
            return [*known.headers, *super().decode(rest, True)]
        finally:
            self.max_header_list_size = longest

    def _learn(self, data: bytes) -> Any:
        ends: list[tuple[int, tuple[Any, ...], int]] = []
        self._ends = ends
        headers = list(super().decode(data, True))
        self._ends = None
        plain = next((number for number, (name, _) in enumerate(headers) if name not in PLAIN_NAMES), len(headers))
        if 0 < plain <= len(ends) and data[0] >> 5 != 1 and ends[plain - 1][0] <= _LONGEST_BEGINNING:
            end, entries, entries_size = ends[plain - 1]
            size = sum(32 + len(name) + len(value) for name, value in headers[:plain])
            del self._beginnings[_MOST_BEGINNINGS - 1 :]
            self._beginnings.insert(0, Beginning(data[:end], tuple(headers[:plain]), size, entries, entries_size))
        return headers

    def _decode_indexed(self, data: Any) -> Any:
        return self._note(super()._decode_indexed(data))

    def _decode_literal(self, data: Any, should_index: bool) -> Any:
        return self._note(super()._decode_literal(data, should_index))

    def _note(self, found: tuple[HeaderTuple, int]) -> tuple[HeaderTuple, int]:
        if self._ends is not None and len(self._ends) < _MOST_FIELDS:
            table, start = self.header_table, self._ends[-1][0] if self._ends else 0
            self._ends.append((start + found[1], tuple(table.dynamic_entries), table._current_size))
        return found


def remember_requests(engine: H2Connection) -> bool:
    """Let a server's new engine reuse decoded beginnings of header blocks. Returns False if impossible."""
    if has_shortcuts():
        engine.decoder = RequestDecoder(engine.decoder.max_header_list_size, _beginnings)
        return True
    return False


def open_window(engine: H2Connection, size: int) -> None:
    """Let a new engine expect `size` more bytes. The caller sends the window update to the peer."""
    if has_shortcuts():
        open_window_past_h2(engine, size)
    else:
        engine.increment_flow_control_window(size)
        engine.clear_outbound_data_buffer()


def open_window_past_h2(engine: H2Connection, size: int) -> None:
    """The shortcut of `open_window`."""
    engine._inbound_flow_control_window_manager.window_opened(size)


def spend_window(engine: H2Connection, stream_id: int, size: int) -> bool:
    """Account in h2 for DATA sent without it. Returns False if h2 must send the data itself."""
    if not has_shortcuts():
        return False
    engine.streams[stream_id].outbound_flow_control_window -= size
    engine.outbound_flow_control_window -= size
    return True


def short_answer(engine: H2Connection, stream_id: int, message: bytes) -> bytes | None:
    """A complete answer as frames, built without h2: headers, one DATA frame within the windows, and trailers.

    None if h2 must send it itself; also for the first answer after the peer requested another header table size, because the
    next block must begin with the new size (RFC 7541, 4.2), which only h2's encoder writes.
    """
    if not has_shortcuts():
        return None
    return answer_past_h2(engine, stream_id, message)


def answer_past_h2(engine: H2Connection, stream_id: int, message: bytes) -> bytes | None:
    """The shortcut of `short_answer`."""
    stream = engine.streams.get(stream_id)
    if stream is None or engine.encoder.table_size_changes:
        return None
    size = len(message)
    state = stream.state_machine
    if state.state is StreamState.HALF_CLOSED_REMOTE and not state.headers_sent:
        # the result of the steps below for a call whose request has ended
        state.headers_sent = state.trailers_sent = True
        state.stream_closed_by = StreamClosedBy.SEND_END_STREAM
        state.state = StreamState.CLOSED
    else:
        for step in ANSWER_STEPS:
            state.process_input(step)
    stream.outbound_flow_control_window -= size
    engine.outbound_flow_control_window -= size
    header, end = frames.frame_header, frames.END_HEADERS
    return b"".join((
        header(len(_ANSWER_HEADERS), frames.HEADERS, end, stream_id),
        _ANSWER_HEADERS,
        header(size, frames.DATA, 0, stream_id),
        message,
        header(len(_ANSWER_TRAILERS), frames.HEADERS, end | frames.END_STREAM, stream_id),
        _ANSWER_TRAILERS,
    ))  # fmt: skip


@lru_cache(maxsize=1)
def has_shortcuts() -> bool:
    """Whether the installed h2 and hpack have the names that the shortcuts need, and both paths give the same result."""
    from siderolink.common.grpc.h2_trial import try_shortcuts

    try:
        return try_shortcuts()
    except Exception:
        return False
