"""The messages of a tunnel stream, sans-IO: WireGuard datagrams as `PeerPacket`s in gRPC's length-prefixed frames.

One message is 0x00, the length in four bytes (big-endian), then the protobuf: tag 0x12, the datagram's length as a varint, the
datagram. If that varint takes two bytes (128 to 16,383), the header has eight bytes, and datagrams of one length with eight
bytes of headroom each become a run of messages by filling the headroom.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from siderolink.common.grpc import Refusal, Refused
from siderolink.common.protobuf_wire import BYTES, MalformedWireError, encode_varint, read_key, value_bounds
from siderolink.common.wireguard.path import Datagrams

HEADROOM = 8
"""Free bytes before each datagram, to avoid a copy."""
MAX_DATAGRAM = 65_535
MAX_MESSAGE = MAX_DATAGRAM + 1024
"""Maximum message accepted: the longest datagram, with room for fields of newer peers."""
MAX_FIELDS = 16
"""Maximum fields of a message; there is one, and newer peers may send a few more."""
MAX_USELESS = 1024
"""Maximum messages of a stream whose datagram is missing, or shorter than any of WireGuard's. Peers send none, and 256 KiB
contain 50,000 of them."""

_FIELD = 2
_TAG = 0x12
_PREFIX = 5
_SHORTEST_DATAGRAM = 32
"""WireGuard's keepalive."""
_SHORTEST_ROW = 128
_LONGEST_ROW = 16_383
_MOST_ROWS = 256
"""Rows compared at once: enough for a whole read, few enough that many short runs cost little more than their messages."""


@dataclass(slots=True)
class MessageRun:
    """Consecutive messages of `stride` bytes each, except that the last may be shorter."""

    data: memoryview
    stride: int
    sent: int = 0
    """Bytes already sent."""

    @property
    def begun_end(self) -> int:
        """The end of the last message that is at least partly sent."""
        return min(-(-self.sent // self.stride) * self.stride, len(self.data))

    @property
    def messages(self) -> int:
        """Messages of which nothing was sent."""
        return -(-(len(self.data) - self.begun_end) // self.stride)


@lru_cache(maxsize=256)
def message_header(size: int) -> bytes:
    """The bytes before a datagram of `size` bytes on the wire."""
    varint = encode_varint(size)
    return b"\0" + (1 + len(varint) + size).to_bytes(4) + bytes((_TAG,)) + varint


def encode(datagrams: Datagrams) -> list[MessageRun]:
    """Convert a batch with tunnel headroom to runs of messages, in place if lengths and buffer allow."""
    size = datagrams.stride - HEADROOM
    last = len(datagrams.data) - (datagrams.count - 1) * datagrams.stride - HEADROOM
    data, stride = datagrams.data, datagrams.stride
    rows = datagrams.count if last == size else datagrams.count - 1
    if data.readonly or not _SHORTEST_ROW <= size <= _LONGEST_ROW:
        runs = [_copy([datagrams.row(index) for index in range(rows)])] if rows else []
        return [*runs, _copy([datagrams.row(rows)])] if rows < datagrams.count else runs
    _fill(data, message_header(size), rows, stride)
    if last == size:
        return [MessageRun(data, stride)]
    if last >= _SHORTEST_ROW:
        data[rows * stride : rows * stride + HEADROOM] = message_header(last)
        return [MessageRun(data, stride)]
    return [MessageRun(data[: rows * stride], stride), _copy([datagrams.row(rows)])]


def _fill(data: memoryview, header: bytes, rows: int, stride: int) -> None:
    """Write the header at the start of every row."""
    if not stride % HEADROOM:
        data[: rows * stride].cast("Q")[:: stride // HEADROOM] = memoryview(header * rows).cast("Q")
        return
    end = (rows - 1) * stride + 1
    for column in range(HEADROOM):
        data[column : column + end : stride] = header[column : column + 1] * rows


def _copy(datagrams: Sequence[memoryview]) -> MessageRun:
    """Messages of datagrams of equal length."""
    size = len(datagrams[0])
    header = message_header(size)
    parts = [part for datagram in datagrams for part in (header, datagram)]
    return MessageRun(memoryview(b"".join(parts)), len(header) + size)


class TunnelReader:
    """Reads messages from pieces of any size; a run of datagrams of equal length becomes one batch without a copy."""

    def __init__(self, max_message: int = MAX_MESSAGE) -> None:
        self._max_message = max_message
        self._partial = bytearray()
        self._missing = 0
        self._useless = 0

    def feed(self, pieces: Sequence[memoryview]) -> Iterator[Datagrams]:
        """Yield the datagrams completed by the next bytes, as slices of the piece if possible.

        Raises Refused: MESSAGE_COMPRESSED, MESSAGE_TOO_LARGE or MESSAGE_MALFORMED; the reader cannot be used afterwards.
        """
        if self._partial and sum(map(len, pieces)) < self._missing:
            self._keep(pieces)
            return
        chunk = pieces[0]
        if self._partial or len(pieces) > 1:
            chunk = memoryview(bytearray().join((self._partial, *pieces)))  # writable, for decryption in place
            self._partial.clear()
        pos, end = 0, len(chunk)
        while end - pos >= _PREFIX:
            head = bytes(chunk[pos : pos + HEADROOM])
            total = _PREFIX + _length(head, self._max_message)
            if end - pos < total:
                break
            headroom = _headroom(head, total)
            if headroom:
                batch, pos = _run(chunk, pos, end, head[:headroom], total)
                if total - headroom < _SHORTEST_DATAGRAM:
                    self._count_useless(batch.count)
                yield batch
            else:
                datagram = parse_peer_packet(chunk[pos + _PREFIX : pos + total])
                pos += total
                if datagram is None or len(datagram) < _SHORTEST_DATAGRAM:
                    self._count_useless(1)
                if datagram is not None:
                    yield Datagrams(datagram, 1, len(datagram))
        if pos < end:
            self._keep([chunk[pos:]])

    def _count_useless(self, count: int) -> None:
        self._useless += count
        if self._useless > MAX_USELESS:
            raise Refused(Refusal.MESSAGE_MALFORMED, f"more than {MAX_USELESS} messages without a WireGuard datagram")

    def _keep(self, pieces: Sequence[memoryview]) -> None:
        """Buffer the beginning of a message until the missing bytes have arrived."""
        for piece in pieces:
            self._partial += piece
        have = len(self._partial)
        if have < _PREFIX:
            self._missing = _PREFIX - have
        else:
            self._missing = _PREFIX + _length(bytes(self._partial[:_PREFIX]), self._max_message) - have


def _length(head: bytes, longest: int) -> int:
    """The length in a message's prefix. Raises Refused."""
    if head[0]:
        raise Refused(Refusal.MESSAGE_COMPRESSED, "the message is compressed, but no compression was negotiated")
    length = int.from_bytes(head[1:_PREFIX])
    if length > longest:
        raise Refused(Refusal.MESSAGE_TOO_LARGE, f"the message has {length} bytes, more than {longest}")
    return length


def _headroom(head: bytes, total: int) -> int:
    """The header's length if the message is a datagram after the shortest possible header; otherwise 0."""
    if len(head) < HEADROOM or head[5] != _TAG:
        return 0
    if head[6] < _SHORTEST_ROW:
        return HEADROOM - 1 if 0 < head[6] == total - HEADROOM + 1 else 0
    size = head[6] & 0x7F | head[7] << 7
    return HEADROOM if head[7] < 0x80 and _SHORTEST_ROW <= size == total - HEADROOM else 0


def _run(chunk: memoryview, start: int, end: int, head: bytes, stride: int) -> tuple[Datagrams, int]:
    """The batch that begins at `start`, and its end: rows with the same header, and one shorter row after them."""
    headroom = len(head)
    count = _alike(chunk, start, end, head, stride)
    stop = start + count * stride
    tail = bytes(chunk[stop : stop + HEADROOM])
    if len(tail) == HEADROOM and not tail[0]:
        total = _PREFIX + int.from_bytes(tail[1:_PREFIX])
        if total < stride and total <= end - stop and _headroom(tail, total) == headroom:
            count += 1
            stop += total
    return Datagrams(chunk[start:stop], count, stride, headroom), stop


def _alike(chunk: memoryview, start: int, end: int, head: bytes, stride: int) -> int:
    """How many messages from `start` on have the same header as the first."""
    headroom, most, count = len(head), (end - start) // stride, 1
    at = start + stride
    while count < most and chunk[at : at + headroom] == head:
        rows = 1
        if headroom == HEADROOM and not stride % HEADROOM:
            rows = _equal_rows(chunk[at : at + min(most - count, _MOST_ROWS) * stride], stride, head)
        count += rows
        at += rows * stride
    return count


def _equal_rows(data: memoryview, stride: int, head: bytes) -> int:
    """How many rows of `data` begin with the eight bytes `head`, until one does not; the stride is a multiple of eight."""
    column = data.cast("Q")[:: stride // HEADROOM].tobytes()
    rows = len(column) // HEADROOM
    if column == head * rows:
        return rows
    return next(row for row in range(rows) if not column.startswith(head, row * HEADROOM))


def parse_peer_packet(message: memoryview) -> memoryview | None:
    """The datagram in one PeerPacket, or None; skips unknown fields. Raises Refused."""
    found: memoryview | None = None
    pos = fields = 0
    try:
        while pos < len(message):
            fields += 1
            if fields > MAX_FIELDS:
                raise MalformedWireError(f"more than {MAX_FIELDS} fields")
            field, wire_type, pos = read_key(message, pos)
            start, pos = value_bounds(message, pos, wire_type)
            if field == _FIELD and wire_type == BYTES:
                found = message[start:pos]
    except MalformedWireError as error:
        raise Refused(Refusal.MESSAGE_MALFORMED, f"the message is not a PeerPacket: {error}") from None
    return found if found else None
