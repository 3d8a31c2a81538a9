"""Splits what arrives on a connection into HTTP/2 frames' bytes, and counts what a hostile peer could flood with. No I/O."""

import struct
from collections.abc import Callable, Iterator

from siderolink.common.grpc.limits import Limits
from siderolink.common.grpc.refusals import Refusal, Refused

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says first (RFC 9113, 3.4)."""
FRAME_HEADER_BYTES = 9

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_HEADERS = 0x4
END_STREAM = 0x1
ACK = 0x1

_FRAME_HEADER = struct.Struct(">HBBBL")
_WINDOW_UPDATE = struct.Struct(">HBBBLL")
_CREDIT_PER_FRAME = 4
_MAX_CREDIT = 4096


def frame_header(length: int, frame_type: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes before a frame's payload (RFC 9113, 4.1)."""
    return _FRAME_HEADER.pack(length >> 8, length & 0xFF, frame_type, flags, stream_id)


def read_header(data: bytes, pos: int) -> tuple[int, int, int, int]:
    """Length, type, flags and stream of the frame whose header is at `pos`; the reserved bit is ignored."""
    high, low, kind, flags, stream_id = _FRAME_HEADER.unpack_from(data, pos)
    return high << 8 | low, kind, flags, stream_id & 0x7FFF_FFFF


def window_update(stream_id: int, increment: int) -> bytes:
    """A whole WINDOW_UPDATE frame (RFC 9113, 6.9)."""
    return _WINDOW_UPDATE.pack(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


class FloodGuard:
    """Counts kinds of frames over fixed spans of time. Frames that answer data of ours are not counted."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._interval = limits.flood_interval
        self._allowed = {
            Refusal.RESET_FLOOD: limits.max_resets,
            Refusal.PING_FLOOD: limits.max_pings,
            Refusal.SETTINGS_FLOOD: limits.max_settings,
            Refusal.EMPTY_FRAME_FLOOD: limits.max_empty_frames,
            Refusal.WINDOW_UPDATE_FLOOD: limits.max_window_updates,
            Refusal.OTHER_FRAME_FLOOD: limits.max_other_frames,
        }
        self._clock = clock
        self._counts: dict[Refusal, int] = {}
        self._since = clock()
        self._credit = 0

    def sent_data(self, frames: int = 1) -> None:
        """We sent DATA: the peer may acknowledge it, and ping to measure the round trip, as grpc-go and gRPC core do."""
        self._credit = min(self._credit + frames * _CREDIT_PER_FRAME, _MAX_CREDIT)

    def spend(self, refusal: Refusal) -> None:
        """Count a frame that may be an answer to data of ours."""
        if self._credit:
            self._credit -= 1
        else:
            self.count(refusal)

    def count(self, refusal: Refusal) -> None:
        """Count one; raises Refused with `refusal` when it is one too many."""
        now = self._clock()
        if now - self._since >= self._interval:
            self._since = now
            self._counts.clear()
        count = self._counts.get(refusal, 0) + 1
        self._counts[refusal] = count
        if count > self._allowed[refusal]:
            raise Refused(refusal, f"more than {self._allowed[refusal]} in {self._interval:g} s")


class FrameScanner:
    """Reads frame headers only. DATA of streams in `raw` is handed out as it comes, all other bytes go to the HTTP/2 engine."""

    def __init__(self, limits: Limits, guard: FloodGuard, *, server: bool) -> None:
        self.raw: set[int] = set()
        """Streams whose DATA bypasses the HTTP/2 engine."""
        self._max_frame = limits.max_frame_bytes
        self._max_block = limits.max_header_bytes
        self._guard = guard
        self._preface = PREFACE if server else b""
        self._partial = b""
        self._remaining = 0
        self._raw_id = 0
        self._block = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """Yield (stream id, DATA bytes) for raw streams and (0, bytes) for the engine, in order.

        Each piece must be dealt with before the next is asked for. Raises Refused.
        """
        if self._partial:
            data = self._partial + data
            self._partial = b""
        view = memoryview(data)
        end = len(data)
        start = 0
        pos = self._skip_preface(data)
        while pos < end:
            if self._remaining:
                taken = min(self._remaining, end - pos)
                self._remaining -= taken
                pos += taken
                if self._raw_id:
                    yield self._raw_id, view[pos - taken : pos]
                    start = pos
                continue
            if end - pos < FRAME_HEADER_BYTES:
                self._partial = data[pos:]
                break
            high, low, kind, flags, stream_id = _FRAME_HEADER.unpack_from(data, pos)
            length = high << 8 | low
            self._raw_id = 0
            if kind == DATA and length and not flags and stream_id in self.raw:
                if start < pos:
                    yield 0, view[start:pos]
                if stream_id in self.raw:
                    self._raw_id = stream_id
                start = pos + FRAME_HEADER_BYTES if self._raw_id else pos
            self._check(kind, flags, length)
            self._remaining = length
            pos += FRAME_HEADER_BYTES
        if start < pos:
            yield 0, view[start:pos]

    def _skip_preface(self, data: bytes) -> int:
        if not self._preface:
            return 0
        length = min(len(self._preface), len(data))
        if data[:length] != self._preface[:length]:
            raise Refused(Refusal.NOT_HTTP2, "the connection did not begin with HTTP/2's preface")
        self._preface = self._preface[length:]
        return length

    def _check(self, kind: int, flags: int, length: int) -> None:
        if length > self._max_frame:
            raise Refused(Refusal.FRAME_TOO_LARGE, f"a frame of {length} bytes, more than {self._max_frame}")
        if kind == DATA:
            if not length and not flags & END_STREAM:
                self._guard.count(Refusal.EMPTY_FRAME_FLOOD)
        elif kind in (HEADERS, CONTINUATION):
            self._check_headers(kind, length)
        elif kind == WINDOW_UPDATE:
            self._guard.spend(Refusal.WINDOW_UPDATE_FLOOD)
        elif kind == PING:
            self._guard.spend(Refusal.PING_FLOOD)
        elif kind == RST_STREAM:
            self._guard.count(Refusal.RESET_FLOOD)
        elif kind == SETTINGS:
            self._guard.count(Refusal.SETTINGS_FLOOD)
        else:
            self._guard.count(Refusal.OTHER_FRAME_FLOOD)

    def _check_headers(self, kind: int, length: int) -> None:
        self._block = length if kind == HEADERS else self._block + length
        if self._block > self._max_block:
            raise Refused(Refusal.HEADERS_TOO_LARGE, f"a header block of more than {self._max_block} bytes")
        if not length:
            self._guard.count(Refusal.EMPTY_FRAME_FLOOD)
