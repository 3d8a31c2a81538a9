"""Consecutive small packets for one peer as rows of one batch, because the interface gives each by itself."""

from typing import Final

from siderolink.common.wireguard.packets.buffers import Packets, Scratch, padded, round_up
from siderolink.common.wireguard.packets.headers import VNET_SIZE
from siderolink.common.wireguard.packets.split import MAX_FRAME, MalformedFrame, place_packet

MAX_ROWS: Final = 64


class Gatherer:
    """Collects frames without segmentation; all rows but the last get one padded length, so that order is kept."""

    def __init__(self, mtu: int, max_rows: int = MAX_ROWS) -> None:
        self._mtu = mtu
        self._max_rows = max_rows
        self._scratch = Scratch(max_rows * round_up(mtu))
        self._count = self._stride = self._length = self._last = 0

    def __len__(self) -> int:
        return self._count

    def add(self, frame: memoryview) -> bool:
        """Take the frame as the next row. False if it cannot be one: then take() what is here first, or split() the frame.

        An empty gatherer takes every well-formed frame that is no super-packet and fits the MTU. Raises MalformedFrame.
        """
        size = len(frame) - VNET_SIZE
        if not 20 <= size <= MAX_FRAME:
            raise MalformedFrame(f"a frame of {len(frame)} bytes")
        if frame[1] or size > self._mtu:
            return False
        length = padded(size, self._mtu)
        if not self._count:
            self._length, self._stride = length, round_up(size)
        elif length > self._length or self._last < self._length or self._count >= self._max_rows:
            return False
        at = self._count * self._stride
        place_packet(frame, self._scratch.view[at : at + self._stride], self._mtu)
        self._last = length
        self._count += 1
        return True

    def take(self) -> Packets | None:
        """All rows so far, good until add() is called again; None if there are none."""
        count, stride, length = self._count, self._stride, self._length
        if not count:
            return None
        self._count = 0
        rows = self._scratch.rows(0, stride, length, count)
        return Packets(self._scratch.view[: (count - 1) * stride + self._last], count, stride, length, self._last, rows)
