"""Finds which rows of a batch continue one another, for all rows of one shape at once."""

from functools import lru_cache
from typing import Final

import numpy as np

from siderolink.common.wireguard.packets.buffers import Array
from siderolink.common.wireguard.packets.checksum import MODULUS, pseudo_header_sum, row_sums, swap
from siderolink.common.wireguard.packets.headers import CWR, FIN, PSH, TCP, UDP, Inner
from siderolink.common.wireguard.packets.seal import Opened

_WINDOW: Final = 256
"""Rows examined together: enough for one whole receive, few enough that irregular batches stay cheap."""
_ENDING: Final = bytes(bool(flags & (FIN | PSH)) for flags in range(256))
_BEGINNING: Final = bytes(bool(flags & CWR) for flags in range(256))


class Continuity:
    """Continuations among the rows from `first` on that have the first one's layout (`inner`) and addresses.

    A row continues the one before it if its header is the same except for the sequence number (or IPv4 ID), which must follow
    on, and the checksum, which must be valid. CWR may only begin a run, PSH and FIN only end it (RFC 9293, RFC 3168).
    """

    __slots__ = ("_begins", "_breaks", "_ends", "_first", "_is_whole", "_limit", "_wrong")

    def __init__(self, opened: Opened, first: int, inner: Inner) -> None:
        whole = opened.count if opened.last >= inner.total else opened.count - 1
        self._first = first
        self._limit = min(whole, first + _WINDOW)
        self._is_whole = self._limit == whole
        self._breaks = self._find_breaks(opened, inner)
        self._wrong = self._find_wrong(opened, inner)
        self._begins = self._ends = b""
        if inner.protocol == TCP:
            flags = opened.scratch.column(inner.transport + 13, opened.stride, "u1")[first : self._limit].tobytes()
            self._begins, self._ends = flags.translate(_BEGINNING), flags.translate(_ENDING)

    def run(self, row: int, room: int) -> int | None:
        """The length of the run that begins at `row`, at most `room`; 0 if that row's own checksum is wrong.

        None if the run may continue beyond the rows examined; another examination from `row` on decides that.
        """
        start, limit = row - self._first, self._limit - self._first
        end = min(start + room, limit)
        wrong = self._wrong.find(1, start, end)
        if wrong >= 0:
            end = wrong
        for marks in (self._breaks, self._begins):
            at = marks.find(1, start + 1, end)
            if at >= 0:
                end = at
        last = self._ends.find(1, start, end)
        if last >= 0:
            end = last + 1
        if end == limit and start and end < start + room and not self._is_whole:
            return None
        return end - start

    def _find_breaks(self, opened: Opened, inner: Inner) -> bytes:
        """For each row, whether its header does not continue the one before."""
        scratch, stride, first, limit = opened.scratch, opened.stride, self._first, self._limit
        heads = scratch.matrix(0, stride, inner.header // 4)[first:limit]
        changes = heads[1:] ^ heads[:-1]
        changes &= _compared(inner.version, inner.protocol, inner.transport, inner.header)
        found = np.bitwise_or.reduce(changes, axis=1)
        if inner.protocol == TCP:
            sequence = heads[:, inner.transport // 4 + 1].byteswap()
            steps = sequence[1:] - sequence[:-1]
            steps ^= inner.total - inner.header
            found |= steps
        else:
            found |= scratch.column(inner.transport + 6, stride, "<u2")[first + 1 : limit] == 0
        if inner.version == 4:
            ids = scratch.column(4, stride, "<u2")[first:limit].byteswap()
            found |= (ids[1:] - ids[:-1]) ^ 1
        breaks = bytearray(b"\0")
        breaks += (found != 0).data
        if False in opened.good:
            for row, good in enumerate(opened.good[first:limit]):
                if not good:
                    breaks[row : row + 2] = b"\1\1"
        return bytes(breaks)

    def _find_wrong(self, opened: Opened, inner: Inner) -> bytes:
        """For each row, whether its checksums are wrong; empty if none is."""
        scratch, stride, first, limit = opened.scratch, opened.stride, self._first, self._limit
        version, protocol, transport, _, total = inner
        words = (total - transport + 3) // 4
        if transport + words * 4 > opened.length:  # the bytes after each row are undefined
            scratch.matrix(opened.length, stride, stride - opened.length, "u1")[first:limit] = 0
        sums = row_sums(scratch.matrix(transport, stride, words)[first:limit])
        pseudo = pseudo_header_sum(scratch.view[first * stride :][:40], version, protocol)
        sums += swap(pseudo) + swap(total - transport)
        sums %= MODULUS
        if version == 4:
            sums |= row_sums(scratch.matrix(0, stride, transport // 4)[first:limit]) % MODULUS
        return (sums != 0).tobytes() if np.count_nonzero(sums) else b""


@lru_cache(maxsize=64)
def _compared(version: int, protocol: int, transport: int, header: int) -> Array:
    """The bits of a header that are equal in all rows of a run, as little-endian words."""
    mask = bytearray(b"\xff" * header)
    if version == 4:
        mask[4:6] = mask[10:12] = bytes(2)
    if protocol == TCP:
        mask[transport + 4 : transport + 8] = bytes(4)
        mask[transport + 13] = 0xFF & ~(CWR | FIN | PSH)
        mask[transport + 16 : transport + 18] = bytes(2)
    elif protocol == UDP:
        mask[transport + 6 : transport + 8] = bytes(2)
    return np.frombuffer(bytes(mask), "<u4")
