"""Splits a connection's input into HTTP/2 frames and counts frames that could be used for flooding. No I/O."""

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from hpack import Decoder
from hpack.exceptions import HPACKDecodingError

from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.refusals import Refusal, Refused

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""The client connection preface (RFC 9113, 3.4)."""
FRAME_HEADER_BYTES = 9

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_HEADERS = 0x4
END_STREAM = 0x1
PADDED = 0x8
ACK = 0x1

_FRAME_HEADER = struct.Struct(">HBBBL")
_WINDOW_UPDATE = struct.Struct(">HBBBLL")
GOAWAY_FIELDS = struct.Struct(">LL")
_CREDIT_PER_FRAME = 4
_MAX_CREDIT = 4096

SMALL_BYTES = 32
"""Shorter DATA frames that do not end their stream are counted: WireGuard datagrams and most messages are longer."""
PIECE_FRAMES = 8
"""Maximum frames passed to the HTTP/2 engine at once."""
MAX_SETTINGS_ENTRIES = 64
"""Maximum entries of one SETTINGS frame; peers send fewer than ten."""
_HEADER_TABLE_SIZE = 1
_KNOWN_SETTINGS = range(_HEADER_TABLE_SIZE, 7)
_HEADER_TABLE_BYTES = 4096
_MAX_SIZE_CHANGES = 2
_SETTINGS_ENTRIES = "settings entries"
_SETTING = struct.Struct(">HL")
_MAX_ENDED = 256

_LONGEST_HERE = FRAME_HEADER_BYTES + MAX_SETTINGS_ENTRIES * 6
"""The longest frame handled here."""
_NOTHING = memoryview(b"")
_ENGINE, _NOWHERE, _HERE = 0, -1, -2
"""The destination of a frame; DATA of a raw stream goes to that stream."""


def frame_header(length: int, frame_type: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes before a frame's payload (RFC 9113, 4.1)."""
    return _FRAME_HEADER.pack(length >> 8, length & 0xFF, frame_type, flags, stream_id)


_SETTINGS_ACK = frame_header(0, SETTINGS, ACK, 0)


FrameHeader = tuple[int, int, int, int, int]
"""Where the frame begins, its type, flags and stream, and the length of its payload."""
Piece = tuple[int, memoryview, Sequence[FrameHeader]]
"""DATA of a raw stream, after its id; or after 0 bytes for the engine, and the headers of the frames that begin in them."""


def read_headers(data: bytes) -> list[FrameHeader]:
    """The headers of successive frames, of which the last may be incomplete. Ignores the reserved bit."""
    found, pos = list[FrameHeader](), 0
    while len(data) - pos >= FRAME_HEADER_BYTES:
        high, low, kind, flags, stream_id = _FRAME_HEADER.unpack_from(data, pos)
        found.append((pos, kind, flags, stream_id & 0x7FFF_FFFF, high << 8 | low))
        pos += FRAME_HEADER_BYTES + (high << 8 | low)
    return found


def window_update(stream_id: int, increment: int) -> bytes:
    """A complete WINDOW_UPDATE frame (RFC 9113, 6.9)."""
    return _WINDOW_UPDATE.pack(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


def count_resets(data: bytes) -> int:
    """The number of RST_STREAM frames among complete frames."""
    return sum(header[1] == RST_STREAM for header in read_headers(data))


class HeaderDecoder(Decoder):
    """hpack's decoder with a limit on changes of the table size at the start of a block (RFC 7541, 4.2).

    Each change costs hpack microseconds, and a block has room for 16,000.
    """

    def decode(self, data: bytes, raw: bool = False) -> Any:
        pos = changes = 0
        while pos < len(data) and data[pos] >> 5 == 1:
            changes += 1
            if changes > _MAX_SIZE_CHANGES:
                raise HPACKDecodingError(f"more than {_MAX_SIZE_CHANGES} changes of the header table's size in one block")
            is_long = data[pos] & 0x1F == 0x1F
            pos += 1
            while is_long and pos < len(data):
                is_long = data[pos] >= 0x80
                pos += 1
        return super().decode(data, raw)


@lru_cache(maxsize=8)
def _allowed(limits: Limits) -> Mapping[str, int]:
    """How many frames of each kind may arrive in one interval."""
    return {
        Refusal.RESET_FLOOD: limits.max_resets,
        Refusal.PING_FLOOD: limits.max_pings,
        Refusal.SETTINGS_FLOOD: limits.max_settings,
        _SETTINGS_ENTRIES: limits.max_settings_entries,
        Refusal.EMPTY_FRAME_FLOOD: limits.max_empty_frames,
        Refusal.SMALL_FRAME_FLOOD: limits.max_small_frames,
        Refusal.WINDOW_UPDATE_FLOOD: limits.max_window_updates,
        Refusal.OTHER_FRAME_FLOOD: limits.max_other_frames,
    }


class FloodGuard:
    """Counts kinds of frames per fixed interval. Frames in response to our data are not counted."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._interval = limits.flood_interval
        self._allowed = _allowed(limits)
        self._clock = clock
        self._counts: dict[str, int] = {}
        self._since = clock()
        self._credit = 0

    def sent_data(self, frames: int = 1) -> None:
        """Record sent DATA: the peer may acknowledge it, and ping to measure the round trip, as grpc-go and gRPC core do."""
        self._credit = min(self._credit + frames * _CREDIT_PER_FRAME, _MAX_CREDIT)

    def spend(self, refusal: Refusal) -> None:
        """Count a frame unless it may be a response to our data."""
        if self._credit:
            self._credit -= 1
        else:
            self.count(refusal)

    def count(self, refusal: Refusal, number: int = 1, *, kind: str | None = None) -> None:
        """Count frames of one kind, by default named like the refusal. Raises Refused with `refusal` beyond the limit."""
        kind = kind or refusal
        now = self._clock()
        if now - self._since >= self._interval:
            self._since = now
            self._counts.clear()
        count = self._counts.get(kind, 0) + number
        self._counts[kind] = count
        if count > self._allowed[kind]:
            raise Refused(refusal, f"more than {self._allowed[kind]} in {self._interval:g} s")


class FrameScanner:
    """Reads frame headers in front of the HTTP/2 engine, so that the engine only does what a call needs.

    DATA of streams in `raw` is yielded unprocessed. The preface, PING, PRIORITY, frames of unknown types, DATA for streams that
    this side has reset, and a GOAWAY without an error never reach the engine, which would end all streams at a GOAWAY. It gets
    only the known SETTINGS, with a header table of at most 4,096 bytes.
    """

    def __init__(self, limits: Limits, guard: FloodGuard, *, server: bool) -> None:
        self.raw: set[int] = set()
        """Streams whose DATA bypasses the HTTP/2 engine."""
        self.replies = bytearray()
        """Acknowledgements to send."""
        self.has_settings = False
        """Whether the peer's first SETTINGS have arrived."""
        self.last_stream: int | None = None
        """Set by a GOAWAY without an error: the last stream that the peer will process (RFC 9113, 6.8)."""
        self.guard = guard
        self.dropped = 0
        """Bytes of dropped DATA that are not yet returned to the connection's window."""
        self._reset: OrderedDict[int, int] = OrderedDict()
        self._max_frame = limits.max_frame_bytes
        self._max_block = limits.max_header_bytes
        self._window = limits.stream_window_bytes
        self._is_server = server
        self._preface = PREFACE if server else b""
        self._partial = b""
        self._target = _ENGINE
        self._length = 0
        self._remaining = 0
        self._block = 0
        self._in_block = False
        self._highest_stream = 0
        self._begun: list[FrameHeader] = []

    @property
    def waiting(self) -> int:
        """Bytes that the engine buffers until a frame or header block is complete."""
        begun = self._length - self._remaining if self._remaining and self._target == _ENGINE else 0
        return begun + (self._block if self._in_block else 0)

    def was_reset(self, stream_id: int) -> None:
        """This side reset the stream: DATA in flight, at most one stream window, is dropped instead of being answered."""
        self.raw.discard(stream_id)
        self._reset[stream_id] = self._window
        if len(self._reset) > _MAX_ENDED:
            self._reset.popitem(last=False)

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Yield the pieces in order; they may be empty.

        Each piece must be processed before the next one is requested. A piece for the engine contains at most `PIECE_FRAMES`
        frames. All frames of such a run are counted before its first piece is yielded. Raises Refused.
        """
        data = self._partial + data if self._partial else data
        self._partial = b""
        view = memoryview(data)
        end = len(data)
        start = pos = self._skip_preface(data) if self._preface else 0
        self._begun.clear()
        if self._remaining:
            pos = min(self._remaining, end)
            self._remaining -= pos
            start = pos if self._target else 0
            yield max(self._target, 0), view[:pos] if self._target > 0 else _NOTHING, ()
        while end - pos >= FRAME_HEADER_BYTES:
            high, low, kind, flags, stream_id = _FRAME_HEADER.unpack_from(data, pos)
            length, stream_id = high << 8 | low, stream_id & 0x7FFF_FFFF
            body = pos + FRAME_HEADER_BYTES
            is_plain = kind == DATA and not flags and SMALL_BYTES <= length <= min(self._max_frame, end - body)
            if is_plain and start == pos and stream_id in self.raw and not self._in_block:
                # the most frequent case, a complete frame of a tunnel: the steps below would change nothing
                pos = start = body + length
                yield stream_id, view[body:pos], ()
                continue
            target = self._target_of(kind, flags, length, stream_id)
            if target == _HERE and end - pos < FRAME_HEADER_BYTES + length <= _LONGEST_HERE:
                break
            if target and start < pos:
                yield from self._engine_pieces(view, start, pos)
                start = pos
                target = self._target_of(kind, flags, length, stream_id)
            self._check(kind, flags, length, stream_id)
            if target == _ENGINE:
                self._begun.append((pos, kind, flags, stream_id, length))
            pos = body + length
            if pos > end:
                self._target, self._length, self._remaining, pos = target, length, pos - end, end
            if target:
                start = pos
                yield self._piece_of(target, kind, flags, length, stream_id, view[body:pos])
        self._partial = data[pos:]
        if start < pos:
            yield from self._engine_pieces(view, start, pos)

    def _engine_pieces(self, view: memoryview, start: int, end: int) -> Sequence[Piece]:
        begun, self._begun = self._begun, []
        if len(begun) <= PIECE_FRAMES:
            return ((0, view[start:end], begun),)
        parts = [begun[at : at + PIECE_FRAMES] for at in range(0, len(begun), PIECE_FRAMES)]
        starts = [start, *(part[0][0] for part in parts[1:]), end]
        return [(0, view[starts[at] : starts[at + 1]], part) for at, part in enumerate(parts)]

    def _target_of(self, kind: int, flags: int, length: int, stream_id: int) -> int:
        if kind == HEADERS or self._in_block:
            return _ENGINE  # which rejects everything except CONTINUATION within a block
        if kind == DATA:
            if length and not flags and stream_id in self.raw:
                return stream_id
            return _NOWHERE if 0 < length <= self._reset.get(stream_id, 0) else _ENGINE
        if kind == PING:
            return _HERE if length == 8 and not stream_id else _ENGINE
        if kind == SETTINGS:
            return _HERE if length % 6 == 0 and not stream_id and not (flags & ACK and length) else _ENGINE
        if kind == GOAWAY:
            return _HERE if GOAWAY_FIELDS.size <= length <= _LONGEST_HERE - FRAME_HEADER_BYTES and not stream_id else _ENGINE
        if kind == PRIORITY:
            return _NOWHERE if length == 5 and stream_id else _ENGINE
        return _NOWHERE if kind > CONTINUATION else _ENGINE

    def _piece_of(self, target: int, kind: int, flags: int, length: int, stream_id: int, payload: memoryview) -> Piece:
        """The piece for the begun payload of a frame that the engine does not get as it is."""
        if target == _HERE:
            return 0, self._handle(kind, flags, payload), ()
        if target == _NOWHERE:
            if kind == DATA:
                self._reset[stream_id] -= length
                self.dropped += length
            return 0, _NOTHING, ()
        return target if payload else 0, payload, ()

    def _handle(self, kind: int, flags: int, payload: memoryview) -> memoryview:
        """Handle a PING, GOAWAY or SETTINGS frame; returns the part that the engine needs."""
        if kind == PING:
            if not flags & ACK:
                self.replies += frame_header(8, PING, ACK, 0) + payload
            return _NOTHING
        if kind == GOAWAY:
            last_stream, error_code = GOAWAY_FIELDS.unpack_from(payload)
            if error_code:
                return memoryview(frame_header(len(payload), GOAWAY, flags, 0) + payload)
            self.last_stream = last_stream & 0x7FFF_FFFF
            return _NOTHING
        if flags & ACK:
            return _NOTHING  # our settings never change, so an acknowledgement has no effect
        self.has_settings = True
        known = {name: value for name, value in _SETTING.iter_unpack(payload) if name in _KNOWN_SETTINGS}
        if not known:
            self.replies += _SETTINGS_ACK
            return _NOTHING
        if _HEADER_TABLE_SIZE in known:
            known[_HEADER_TABLE_SIZE] = min(known[_HEADER_TABLE_SIZE], _HEADER_TABLE_BYTES)
        entries = b"".join(_SETTING.pack(name, value) for name, value in known.items())
        return memoryview(frame_header(len(entries), SETTINGS, 0, 0) + entries)

    def _skip_preface(self, data: bytes) -> int:
        length = min(len(self._preface), len(data))
        if data[:length] != self._preface[:length]:
            raise Refused(Refusal.NOT_HTTP2, "the connection did not start with the HTTP/2 preface")
        self._preface = self._preface[length:]
        return length

    def _check(self, kind: int, flags: int, length: int, stream_id: int) -> None:
        if length > self._max_frame:
            raise Refused(Refusal.FRAME_TOO_LARGE, f"a frame of {length} bytes, more than {self._max_frame}")
        if kind == DATA:
            if length < SMALL_BYTES or flags & PADDED:
                self._check_data(flags, length)
        elif kind in (HEADERS, CONTINUATION):
            self._check_headers(kind, flags, length, stream_id)
        elif kind == WINDOW_UPDATE:
            self.guard.spend(Refusal.WINDOW_UPDATE_FLOOD)
        elif kind == PING:
            self.guard.spend(Refusal.PING_FLOOD)
        elif kind == RST_STREAM:
            self.guard.count(Refusal.RESET_FLOOD)
        elif kind == SETTINGS:
            self._check_settings(flags, length)
        else:
            self.guard.count(Refusal.OTHER_FRAME_FLOOD)

    def _check_data(self, flags: int, length: int) -> None:
        if flags & PADDED:  # padding hides the length of the data
            self.guard.spend(Refusal.SMALL_FRAME_FLOOD)
        elif not flags & END_STREAM:
            if length:
                self.guard.spend(Refusal.SMALL_FRAME_FLOOD)
            else:
                self.guard.count(Refusal.EMPTY_FRAME_FLOOD)

    def _check_headers(self, kind: int, flags: int, length: int, stream_id: int) -> None:
        self._block = length if kind == HEADERS else self._block + length
        self._in_block = not flags & END_HEADERS
        if self._block > self._max_block:
            raise Refused(Refusal.HEADERS_TOO_LARGE, f"a header block of more than {self._max_block} bytes")
        if not length:
            self.guard.count(Refusal.EMPTY_FRAME_FLOOD)
        elif kind == CONTINUATION or (self._is_server and stream_id <= self._highest_stream):
            self.guard.count(Refusal.OTHER_FRAME_FLOOD)
        elif not self._is_server:  # a client's call leads to at most two header blocks, apart from interim responses
            self.guard.spend(Refusal.OTHER_FRAME_FLOOD)
        if stream_id > self._highest_stream:
            self._highest_stream = stream_id

    def _check_settings(self, flags: int, length: int) -> None:
        if flags & ACK and length:
            raise Refused(Refusal.PROTOCOL_ERROR, "a SETTINGS acknowledgement with a payload")
        entries = length // 6
        if entries > MAX_SETTINGS_ENTRIES:
            raise Refused(Refusal.SETTINGS_FLOOD, f"a SETTINGS frame of {entries} entries, more than {MAX_SETTINGS_ENTRIES}")
        self.guard.count(Refusal.SETTINGS_FLOOD)
        if entries:
            self.guard.count(Refusal.SETTINGS_FLOOD, entries, kind=_SETTINGS_ENTRIES)
