"""h2's engine of one connection, made ready for our limits, with a short way for the plainest frames.

Most calls come on a connection of their own, so what every connection does is most of what a call costs. What is the same for
all is made once; and frames that ask for next to nothing change the engine's state without becoming objects first. Whatever is
not plain goes h2's own way, with h2's own judgement. Tests hold the two beside each other.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection
from h2.events import Event, RemoteSettingsChanged, WindowUpdated
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from h2.stream import StreamState
from hyperframe.frame import Frame

from siderolink.common.grpc import frames
from siderolink.common.grpc.header_fields import FieldDecoder
from siderolink.common.grpc.limits import DEFAULT_WINDOW, Limits

_STREAM_HEADROOM = 4
_LARGEST_WINDOW = 2**31 - 1
_SETTINGS_ACK = frames.frame_header(0, frames.SETTINGS, frames.ACK, 0)
_PING_ACK = frames.frame_header(8, frames.PING, frames.ACK, 0)
_NO_FLAGS: frozenset[str] = frozenset()
_END_STREAM = frozenset(("END_STREAM",))
_TAKES_DATA = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)


class _PlainFrame(NamedTuple):
    """What the engine reads of a frame of headers or data that is neither padded nor in pieces."""

    stream_id: int
    data: bytes
    flags: frozenset[str]

    @property
    def flow_controlled_length(self) -> int:
        return len(self.data)


class Engine(H2Connection):
    """Make one with `new_h2_connection`."""

    def receive_data(self, data: bytes | memoryview) -> list[Event]:  # type: ignore[override] # no other buffers come
        """As h2's, but for events that nobody here listens to: acknowledged settings, and pings."""
        events: list[Event] = []
        waiting = self.incoming_buffer
        if waiting._preamble_len or waiting._data or waiting._headers_buffer:
            if len(data) < 24 or waiting._preamble_len != len(frames.PREFACE) or data[:24] != frames.PREFACE:
                return super().receive_data(data)
            super().receive_data(data[:24])
            data = data[24:]
        data = bytes(data)
        pos, end = 0, len(data)
        while end - pos >= frames.FRAME_HEADER_BYTES:
            length, kind, flags, stream_id = frames.read_header(data, pos)
            start = pos + frames.FRAME_HEADER_BYTES
            take = _SHORT_WAYS.get(kind)
            if take is None or start + length > end or length > self.max_inbound_frame_size:
                break
            if self.state_machine.state is ConnectionState.CLOSED:
                break
            found = take(self, flags, stream_id, data[start : start + length])
            if found is None:
                break
            events += found
            pos = start + length
        return events + super().receive_data(data[pos:]) if pos < end else events

    def _take_settings(self, flags: int, stream_id: int, payload: bytes) -> list[Event] | None:
        """None of them, or the word that ours were read: they never change, so nothing follows from it."""
        if payload or stream_id or flags not in (0, frames.ACK):
            return None
        self.state_machine.process_input(ConnectionInputs.RECV_SETTINGS)
        if flags:
            return []
        self._data_to_send += _SETTINGS_ACK
        return [RemoteSettingsChanged()]

    def _take_ping(self, flags: int, stream_id: int, payload: bytes) -> list[Event] | None:
        if flags or stream_id or len(payload) != 8:
            return None
        self.state_machine.process_input(ConnectionInputs.RECV_PING)
        self._data_to_send += _PING_ACK + payload
        return []

    def _take_window_update(self, flags: int, stream_id: int, payload: bytes) -> list[Event] | None:
        """For the whole connection."""
        delta = int.from_bytes(payload)
        if stream_id or len(payload) != 4 or not 0 < delta <= _LARGEST_WINDOW - self.outbound_flow_control_window:
            return None
        self.state_machine.process_input(ConnectionInputs.RECV_WINDOW_UPDATE)
        self.outbound_flow_control_window += delta
        return [WindowUpdated(stream_id=0, delta=delta)]

    def _take_headers(self, flags: int, stream_id: int, payload: bytes) -> list[Event] | None:
        """Of a new call, in one block."""
        if flags & ~frames.END_STREAM != frames.END_HEADERS or self.config.client_side:
            return None
        if not stream_id & 1 or stream_id <= self.highest_inbound_stream_id:
            return None
        frame = _PlainFrame(stream_id, payload, _END_STREAM if flags & frames.END_STREAM else _NO_FLAGS)
        return self._judged(self._receive_headers_frame, frame)

    def _take_data(self, flags: int, stream_id: int, payload: bytes) -> list[Event] | None:
        """Of a call that expects it, within both windows."""
        stream = self.streams.get(stream_id)
        if stream is None or flags & ~frames.END_STREAM or stream.state_machine.state not in _TAKES_DATA:
            return None
        frame = _PlainFrame(stream_id, payload, _END_STREAM if flags else _NO_FLAGS)
        return self._judged(self._receive_data_frame, frame)

    def _judged(self, take: Callable[..., tuple[list[Frame], list[Event]]], frame: _PlainFrame) -> list[Event]:
        try:
            answer, events = take(frame)
            self._prepare_for_sending(answer)
            return events
        except ProtocolError as error:
            self._terminate_connection(error.error_code)
            raise


_SHORT_WAYS: dict[int, Callable[[Engine, int, int, bytes], list[Event] | None]] = {
    frames.SETTINGS: Engine._take_settings,
    frames.PING: Engine._take_ping,
    frames.WINDOW_UPDATE: Engine._take_window_update,
    frames.HEADERS: Engine._take_headers,
    frames.DATA: Engine._take_data,
}


@lru_cache(maxsize=2)
def h2_config(*, server: bool) -> H2Configuration:
    return H2Configuration(
        client_side=not server,
        header_encoding="latin-1",  # ASCII on the wire; a byte above it must not raise half way through a frame
        validate_inbound_headers=not server,  # a server checks a request's fields itself: header_fields.check_fields
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        normalize_inbound_headers=False,
    )


def new_h2_connection(limits: Limits, *, server: bool) -> Engine:
    """An engine that has its first words ready to send."""
    connection = Engine(h2_config(server=server))
    # The engine ends a whole connection for one call too many. It is told a higher number than the peer, so that
    # calls opened before the peer has read our settings are refused one by one.
    settings = _settings(limits, server=server)
    if server:
        settings[SettingCodes.MAX_CONCURRENT_STREAMS] *= _STREAM_HEADROOM
    connection.local_settings = Settings(client=not server, initial_values=settings)
    connection.max_inbound_frame_size = limits.max_frame_bytes
    connection.decoder = FieldDecoder(limits.max_header_bytes)
    connection.state_machine.process_input(ConnectionInputs.SEND_SETTINGS)
    connection._inbound_flow_control_window_manager.window_opened(limits.connection_window_bytes - DEFAULT_WINDOW)
    connection._data_to_send += _first_words(limits, server=server)
    return connection


def _settings(limits: Limits, *, server: bool) -> dict[SettingCodes, int]:
    return {
        SettingCodes.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
        SettingCodes.MAX_FRAME_SIZE: limits.max_frame_bytes,
        SettingCodes.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
        (SettingCodes.MAX_CONCURRENT_STREAMS if server else SettingCodes.ENABLE_PUSH): limits.max_streams if server else 0,
    }


@lru_cache(maxsize=8)
def _first_words(limits: Limits, *, server: bool) -> bytes:
    """What either side says first (RFC 9113, 3.4), and how much more the peer may send than it knows."""
    connection = H2Connection(h2_config(server=server))
    connection.local_settings = Settings(client=not server, initial_values=_settings(limits, server=server))
    connection.initiate_connection()
    more = limits.connection_window_bytes - DEFAULT_WINDOW
    return bytes(connection.data_to_send()) + (frames.window_update(0, more) if more else b"")
