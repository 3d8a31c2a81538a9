"""Seals and opens WireGuard data messages (whitepaper, section 5.4.6) as rows of a matrix, with one AEAD call per packet."""

import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import length_hint
from typing import Final, cast

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from siderolink.common.wireguard.noise.messages import TRANSPORT as TRANSPORT_TYPE
from siderolink.common.wireguard.noise.messages import TRANSPORT_HEADER_BYTES as HEADER_SIZE
from siderolink.common.wireguard.noise.messages import TRANSPORT_OVERHEAD as OVERHEAD
from siderolink.common.wireguard.noise.rows import Datagrams as AnyDatagrams
from siderolink.common.wireguard.noise.rows import Packets, RowCipher
from siderolink.common.wireguard.packets.buffers import Array, Scratch, round_up
from siderolink.common.wireguard.path import Datagrams

TAG_SIZE: Final = OVERHEAD - HEADER_SIZE

_HEADER: Final = struct.Struct("<IIQ")
_KIND_AND_RECEIVER: Final = struct.Struct("<II")
_COUNTER: Final = struct.Struct("<Q")
_NONCE: Final = struct.Struct("<4xQ").pack
_NONCE_SIZE: Final = 12
_INITIAL_SIZE: Final = 1 << 16


class Nonces:
    """The nonces of a batch, as cached slices: four zero bytes and a counter each."""

    def __init__(self) -> None:
        self._allocate(64)

    def _allocate(self, count: int) -> None:
        scratch = Scratch(count * _NONCE_SIZE)
        self._counters = scratch.column(4, _NONCE_SIZE, "<u8")
        self._rows = scratch.rows(0, _NONCE_SIZE, _NONCE_SIZE, count)

    def of(self, counters: Array) -> Sequence[memoryview]:
        """At least one nonce per counter, valid until the next call."""
        count = counters.size
        if count > self._counters.size:
            self._allocate(2 * count)
        self._counters[:count] = counters
        return self._rows


class Sealer:
    """Turns packets into datagrams. A result is valid until the next call."""

    def __init__(self) -> None:
        self._scratch = Scratch(_INITIAL_SIZE)
        self._nonces = Nonces()
        self._steps: Array = np.arange(64, dtype=np.uint64)
        self._counters = self._steps.copy()
        self._stamped = (0, 0, 0, 0)
        """Receiver, headroom, stride and number of the rows whose type and receiver are already written."""

    def seal(self, packets: Packets, aead: ChaCha20Poly1305, receiver: int, counter: int, headroom: int = 0) -> Datagrams:
        """Seal row i under counter + i. The caller has permanently reserved `packets.count` counters from `counter` on."""
        count, length, last = packets.count, packets.length, packets.last
        if count == 1:
            return self._seal_one(packets.data[:last], aead, receiver, counter, headroom)
        stride = headroom + OVERHEAD + length
        start = headroom + HEADER_SIZE
        end = (count - 1) * stride + headroom + OVERHEAD + last
        scratch = self._scratch
        if scratch.reserve(end):
            self._stamped = (0, 0, 0, 0)
        if count > self._steps.size:
            self._steps = np.arange(2 * count, dtype=np.uint64)
            self._counters = self._steps.copy()
        if self._stamped[:3] != (receiver, headroom, stride) or self._stamped[3] < count:
            scratch.column(headroom, stride, "<u8")[:count] = receiver << 32 | TRANSPORT_TYPE
            self._stamped = (receiver, headroom, stride, count)
        counters = np.add(self._steps[:count], counter, out=self._counters[:count])
        scratch.column(headroom + 8, stride, "<u8")[:count] = counters
        full = count if last == length else count - 1
        nonces = self._nonces.of(counters)[:full]
        sealed = scratch.rows(start, stride, length + TAG_SIZE, full)
        deque(map(aead.encrypt_into, nonces, packets.rows, repeat(None), sealed), 0)
        if full < count:
            row = packets.data[(count - 1) * packets.stride :]
            aead.encrypt_into(_NONCE(counter + full), row, None, scratch.view[start + full * stride : end])
        return Datagrams(scratch.view[:end], count, stride, headroom)

    def _seal_one(self, row: memoryview, aead: ChaCha20Poly1305, receiver: int, counter: int, headroom: int) -> Datagrams:
        """The same for one row, without column operations."""
        end = headroom + OVERHEAD + len(row)
        self._scratch.reserve(end)
        self._stamped = (0, 0, 0, 0)
        view = self._scratch.view
        _HEADER.pack_into(view, headroom, TRANSPORT_TYPE, receiver, counter)
        aead.encrypt_into(_NONCE(counter), row, None, view[headroom + HEADER_SIZE : end])
        return Datagrams(view[:end], 1, end, headroom)


@dataclass(slots=True)
class Run:
    """Neighbouring datagrams of one kind for one receiver."""

    kind: int
    """The message type with its three reserved bytes; 0 if it is none, or a transport message too short to be one."""
    receiver: int
    """The bytes where transport messages have their receiver index, as a number; 0 if there are none."""
    first: int
    count: int
    """More than 1 only for transport messages."""


def find_runs(datagrams: Datagrams) -> list[Run]:
    """Divide a received batch, which may mix peers, sessions and handshake messages, into runs in order of arrival."""
    data, count, stride, headroom = datagrams.data, datagrams.count, datagrams.stride, datagrams.headroom
    full = count if len(data) == count * stride else count - 1
    if full > 1 and stride - headroom >= OVERHEAD:
        column: Array = np.ndarray((full,), "<u8", data, headroom, (stride,))
        first = bytes(data[headroom : headroom + 8])
        kind, receiver = _KIND_AND_RECEIVER.unpack(first)
        if kind == TRANSPORT_TYPE and column.tobytes() == first * full:
            runs = [Run(kind, receiver, 0, full)]
        else:
            runs = _mixed_runs(datagrams, column)
    else:
        runs = [_single_run(datagrams, row) for row in range(full)]
    if full < count:
        short = _single_run(datagrams, full)
        if runs and short.kind == runs[-1].kind == TRANSPORT_TYPE and short.receiver == runs[-1].receiver:
            runs[-1].count += 1
        else:
            runs.append(short)
    return runs


def _mixed_runs(datagrams: Datagrams, column: Array) -> list[Run]:
    """The runs of equally long datagrams, whose first eight bytes are `column`."""
    breaks = (np.flatnonzero(column[1:] != column[:-1]) + 1).tolist()
    runs: list[Run] = []
    for start, end in zip([0, *breaks], [*breaks, column.size], strict=True):
        kind, receiver = _KIND_AND_RECEIVER.unpack_from(datagrams.data, start * datagrams.stride + datagrams.headroom)
        if kind == TRANSPORT_TYPE:
            runs.append(Run(kind, receiver, start, end - start))
        else:
            runs.extend(Run(kind, receiver, row, 1) for row in range(start, end))
    return runs


def _single_run(datagrams: Datagrams, row: int) -> Run:
    datagram = datagrams.row(row)
    if len(datagram) < 8:
        return Run(0, 0, row, 1)
    kind, receiver = _KIND_AND_RECEIVER.unpack_from(datagram)
    if kind == TRANSPORT_TYPE and len(datagram) < OVERHEAD:
        kind = 0
    return Run(kind, receiver, row, 1)


def read_counters(datagrams: Datagrams, first: int, count: int) -> Array:
    """The counters of a run of transport messages, not yet authenticated."""
    at = first * datagrams.stride + datagrams.headroom + 8
    return np.ndarray((count,), "<u8", datagrams.data, at, (datagrams.stride,))


def text_lengths(datagrams: Datagrams, first: int, count: int) -> tuple[int, int]:
    """The bytes of text in each row of a run but the last, and in the last. Raises ValueError if it is not a run."""
    length = last = datagrams.stride - datagrams.headroom - OVERHEAD
    if first + count == datagrams.count:
        last = len(datagrams.data) - (datagrams.count - 1) * datagrams.stride - datagrams.headroom - OVERHEAD
    if not 0 <= last <= length or count < 1:
        raise ValueError("these rows are not transport messages")
    return length, last


@dataclass(slots=True)
class Opened:
    """The plaintext of a run, as rows of one buffer that the opener reuses for the next batch."""

    scratch: Scratch
    count: int
    stride: int
    """Bytes from one row to the next, a multiple of 16."""
    length: int
    """The padded length of each row but the last."""
    last: int
    """The padded length of the last row, at most `length`."""
    counters: list[int]
    """The counter of each row; it is genuine where `good`."""
    good: list[bool]
    """Whether each row's tag is valid. Set more of them to False to leave rows out, such as replayed ones."""

    @property
    def size(self) -> int:
        """All padded bytes, of bad rows too."""
        return self.length * (self.count - 1) + self.last

    def row(self, index: int) -> memoryview:
        """One row with its padding; zeros if its tag is invalid."""
        start = index * self.stride
        return self.scratch.view[start : start + (self.last if index == self.count - 1 else self.length)]


class Opener:
    """Turns datagrams into packets. A result is valid until the next call."""

    def __init__(self) -> None:
        self._scratch = Scratch(_INITIAL_SIZE)
        self._nonces = Nonces()

    def open(self, datagrams: Datagrams, first: int, count: int, aead: ChaCha20Poly1305) -> Opened:
        """Open a run of transport messages (of find_runs). A row with a wrong tag is erased; the others are not affected."""
        data, step = datagrams.data, datagrams.stride
        start = first * step + datagrams.headroom + HEADER_SIZE
        length, last = text_lengths(datagrams, first, count)
        scratch = self._scratch
        if count == 1:
            scratch.reserve(round_up(last))
            counter = _COUNTER.unpack_from(data, start - 8)[0]
            good = _open_row(aead, counter, data[start : start + last + TAG_SIZE], scratch.view[:last])
            return Opened(scratch, 1, round_up(last), last, last, [counter], [good])

        stride = round_up(length) or 16
        scratch.reserve(count * stride)
        column = read_counters(datagrams, first, count)
        counters: list[int] = column.tolist()
        full = count if last == length else count - 1
        width = length + TAG_SIZE
        if datagrams.cache is not None:
            sealed = datagrams.cache.rows(start, step, width, full)
        else:
            sealed = [data[at : at + width] for at in range(start, start + full * step, step)]
        flags = _open_rows(aead, self._nonces.of(column), sealed, scratch.rows(0, stride, length, full), full)
        if full < count:
            sealed_last = data[start + full * step :][: last + TAG_SIZE]
            flags.append(_open_row(aead, counters[-1], sealed_last, scratch.view[full * stride :][:last]))
        return Opened(scratch, count, stride, length, last, counters, flags)


def _open_row(aead: ChaCha20Poly1305, counter: int, sealed: memoryview, plain: memoryview) -> bool:
    try:
        aead.decrypt_into(_NONCE(counter), sealed, None, plain)
    except InvalidTag:
        plain[:] = bytes(len(plain))  # decrypt_into writes the plaintext before it compares the tag
        return False
    return True


def _open_rows(
    aead: ChaCha20Poly1305,
    nonces: Sequence[memoryview],
    sealed: Sequence[memoryview],
    plain: Sequence[memoryview],
    count: int,
) -> list[bool]:
    """Open `count` rows; there may be more slices."""
    good = [True] * count
    # After an exception the map continues with the next row; the iterator of nonces shows which row failed.
    remaining = iter(nonces[:count])
    opening = map(aead.decrypt_into, remaining, sealed, repeat(None), plain)
    while True:
        try:
            deque(opening, 0)
        except InvalidTag:
            row = count - length_hint(remaining) - 1
            plain[row][:] = bytes(len(plain[row]))
            good[row] = False
        else:
            return good


class MatrixCiphers:
    """Makes the ciphers of one device. They share its buffers: a batch is valid until the next one in the same direction."""

    def __init__(self) -> None:
        self._sealer = Sealer()
        self._opener = Opener()

    def __call__(self, key: bytes) -> RowCipher:
        return _MatrixCipher(ChaCha20Poly1305(key), self._sealer, self._opener)


class _MatrixCipher:
    """One key of a session: see `RowCipher`."""

    __slots__ = ("_aead", "_opener", "_sealer")

    def __init__(self, aead: ChaCha20Poly1305, sealer: Sealer, opener: Opener) -> None:
        self._aead = aead
        self._sealer = sealer
        self._opener = opener

    def seal(self, packets: Packets, receiver: int, counter: int, headroom: int) -> Datagrams:
        return self._sealer.seal(packets, self._aead, receiver, counter, headroom)

    def open(self, datagrams: AnyDatagrams, first: int, count: int) -> Opened:
        return self._opener.open(cast("Datagrams", datagrams), first, count, self._aead)
