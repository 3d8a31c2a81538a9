"""Collects consecutive small packets for one peer into one batch, because the interface delivers them one by one."""

from typing import Final

from siderolink.common.wireguard.noise.routing import padded_length
from siderolink.common.wireguard.noise.rows import Packets
from siderolink.common.wireguard.packets.buffers import Scratch, round_up
from siderolink.common.wireguard.packets.checksum import complete_checksum, row_complements, row_sums
from siderolink.common.wireguard.packets.headers import NEEDS_CSUM, VNET_HEADER, VNET_SIZE, Gso
from siderolink.common.wireguard.packets.parts import PacketInterface
from siderolink.common.wireguard.packets.shape import MalformedFrame, packet_size

MAX_ROWS: Final = 64
_ZEROS: Final = bytes(16)


class Gatherer:
    """Collects frames without segmentation; all rows but the last get one padded length, so that order is kept.

    Frames with the size and virtio_net_hdr of the first one, as most packets of one flow have, are only copied; padding and
    checksums are then written for all of them at once.
    """

    def __init__(self, mtu: int, max_rows: int = MAX_ROWS) -> None:
        self.headroom = 0
        """The path's headroom, which this implementation ignores."""
        self._mtu = mtu
        self._max_rows = max_rows
        self._scratch = Scratch(max_rows * round_up(mtu))
        self._count = self._room = self._stride = self._length = self._last = 0
        self._alike = 0
        """The number of first rows that still need padding and checksum."""
        self._frame_size = 0
        self._header = b""

    def __len__(self) -> int:
        return self._count

    def single(self, frame: memoryview, headroom: int) -> Packets:
        """The frame's packet as a batch of one, valid until the next call: see `SmallPacketGatherer`."""
        view = self._scratch.view
        length = place_packet(frame, view, self._mtu)
        row = view[:length]
        return Packets(row, 1, length, length, length, (row,))

    def add(self, frame: memoryview) -> bool:
        """Add the frame as the next row. False if it does not fit the batch: call take() first.

        An empty gatherer accepts every well-formed frame that is not a super-packet. Raises MalformedFrame.
        """
        count = self._count
        if count and count == self._alike and len(frame) == self._frame_size and frame[:VNET_SIZE] == self._header:
            if count >= self._room:
                return False
            at = count * self._stride
            self._scratch.view[at : at + self._frame_size - VNET_SIZE] = frame[VNET_SIZE:]
            self._alike = self._count = count + 1
            return True
        return self._add_first(frame) if not count else self._add_other(frame)

    def _add_first(self, frame: memoryview) -> bool:
        size = _small_size(frame)
        flags, _, _, _, start, offset = VNET_HEADER.unpack_from(frame)
        if flags & NEEDS_CSUM and start + offset + 2 > size:
            raise MalformedFrame("the checksum field lies outside the packet")
        self._frame_size, self._header = len(frame), bytes(frame[:VNET_SIZE])
        self._stride, self._length = round_up(size), padded_length(size, self._mtu)
        self._room = self._max_rows
        if size > self._mtu:  # the interface's MTU has just been reduced
            self._room = 1
            self._scratch.reserve(self._stride)
        self._last = self._length
        self._scratch.view[:size] = frame[VNET_SIZE:]
        self._alike = self._count = 1
        return True

    def _add_other(self, frame: memoryview) -> bool:
        length = padded_length(_small_size(frame), self._mtu)
        if length > self._length or self._last < self._length or self._count >= self._room:
            return False
        at = self._count * self._stride
        place_packet(frame, self._scratch.view[at : at + self._stride], self._mtu)
        self._last = length
        self._count += 1
        return True

    def read_on(self, interface: PacketInterface, most: int) -> tuple[memoryview | None, int]:
        """The interface's next frame, and 0: see `SmallPacketGatherer`."""
        return interface.read(), 0

    def take(self) -> Packets | None:
        """Return and clear the batch, valid until the next add(); None if it is empty."""
        count, stride, length = self._count, self._stride, self._length
        if not count:
            return None
        self._count = 0
        if count == 1:
            self._finish_one(self._frame_size - VNET_SIZE)
            row = self._scratch.view[:length]
            return Packets(row, 1, stride, length, length, (row,))
        self._finish(self._alike, self._frame_size - VNET_SIZE)
        rows = self._scratch.rows(0, stride, length, count)
        return Packets(self._scratch.view[: (count - 1) * stride + self._last], count, stride, length, self._last, rows)

    def _finish_one(self, size: int) -> None:
        """The same as `_finish` for one row, without column operations."""
        view = self._scratch.view
        if size < self._length:
            view[size : self._length] = bytes(self._length - size)
        flags, _, _, _, start, offset = VNET_HEADER.unpack(self._header)
        if flags & NEEDS_CSUM:
            complete_checksum(view[:size], start, offset)

    def _finish(self, count: int, size: int) -> None:
        """Write padding and checksums of the first rows."""
        scratch, stride = self._scratch, self._stride
        if size < stride:
            scratch.matrix(size, stride, stride - size, "u1")[:count] = 0
        flags, _, _, _, start, offset = VNET_HEADER.unpack(self._header)
        if not flags & NEEDS_CSUM:
            return
        if count < 4 or start % 4:
            for at in range(0, count * stride, stride):
                complete_checksum(scratch.view[at : at + size], start, offset)
            return
        sums = row_sums(scratch.matrix(start, stride, (stride - start) // 4)[:count])
        checksums = row_complements(sums, 0)
        if offset == 6:  # UDP: zero would mean "no checksum" (RFC 768)
            checksums[checksums == 0] = 0xFFFF
        scratch.column(start + offset, stride, "<u2")[:count] = checksums


def _small_size(frame: memoryview) -> int:
    size = packet_size(frame)
    if frame[1] != Gso.NONE:
        raise MalformedFrame("a super-packet among small ones")
    return size


def place_packet(frame: memoryview, view: memoryview, mtu: int) -> int:
    """Write the frame's one packet, padded and with a finished checksum, to the start of `view`.

    `view` holds the packet rounded up to 16. Returns the padded length. Raises MalformedFrame.
    """
    flags, _, _, _, start, offset = VNET_HEADER.unpack_from(frame)
    size = len(frame) - VNET_SIZE
    view[:size] = frame[VNET_SIZE:]
    if flags & NEEDS_CSUM:
        if start + offset + 2 > size:
            raise MalformedFrame("the checksum field lies outside the packet")
        complete_checksum(view[:size], start, offset)
    length = padded_length(size, mtu)
    view[size:length] = _ZEROS[: length - size]
    return length
