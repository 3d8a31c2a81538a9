"""Splits super-packets from a TUN interface into rows of padded packets: segmentation of TCP (TSO) and UDP (USO)."""

import struct
from typing import Final

import numpy as np

from siderolink.common.wireguard.noise.routing import padded_length
from siderolink.common.wireguard.noise.rows import Packets
from siderolink.common.wireguard.packets.buffers import Array, Scratch, round_up
from siderolink.common.wireguard.packets.checksum import complement, row_complements, row_sums, swap, word_sum
from siderolink.common.wireguard.packets.headers import CWR, FIN, PSH, TCP, UDP, VNET_SIZE, Gso
from siderolink.common.wireguard.packets.shape import Shape, packet_size, parse_shape

MAX_BATCH: Final = 1 << 18
"""The bytes of all rows of one batch, unless a single super-packet takes more."""
_INITIAL_SIZE: Final = 1 << 16
_MAX_SHAPES: Final = 128
_PUT_16: Final = struct.Struct(">H").pack_into


class _Layout:
    """The views through which rows of one shape are written."""

    __slots__ = (
        "bodies",
        "checksums",
        "head",
        "heads",
        "ids",
        "ip_checksums",
        "numbers",
        "padding",
        "part",
        "rows",
        "sequences",
        "steps",
        "stride",
        "words",
    )

    def __init__(self, array: Array, shape: Shape, rows: int) -> None:
        transport, header, size = shape.transport, shape.header, shape.size
        stride = self.stride = round_up(size)
        offset = 16 if shape.protocol == TCP else 6
        self.rows = rows
        self.head, self.part = np.dtype(f"V{header}"), np.dtype(f"V{shape.gso_size}")
        self.heads: Array = np.ndarray((rows,), self.head, array, 0, (stride,))
        self.bodies: Array = np.ndarray((rows,), self.part, array, header, (stride,))
        self.padding: Array | None = None
        if stride > size:
            self.padding = np.ndarray((rows, stride - size), np.uint8, array, size, (stride, 1))
        self.steps: Array = np.arange(rows, dtype=np.uint32) * np.uint32(shape.gso_size)
        self.numbers: Array = np.empty(rows, np.uint32)
        self.sequences: Array = np.ndarray((rows,), "<u4", array, transport + 4, (stride,))
        self.checksums: Array = np.ndarray((rows,), "<u2", array, transport + offset, (stride,))
        self.words: Array = np.ndarray((rows, (stride - transport) // 4), "<u4", array, transport, (stride, 4))
        self.ids: Array = np.ndarray((rows,), ">u2", array, 4, (stride,))
        self.ip_checksums: Array = np.ndarray((rows,), ">u2", array, 10, (stride,))


class Splitter:
    """Splits super-packets into segments, those of one shape into one batch. A result is valid until the next add()."""

    def __init__(self, mtu: int) -> None:
        self.headroom = 0
        """The path's headroom; unused here, because sealing copies the rows."""
        self._mtu = mtu
        self._scratch = Scratch(_INITIAL_SIZE)
        self._layouts: dict[Shape, _Layout] = {}
        self._shapes: dict[tuple[bytes, bytes, int], Shape] = {}
        """A cache of TCP over IPv6 shapes, keyed by everything that they depend on: frames for one peer are mostly alike."""
        self._count = 0
        """The rows that are filled."""
        self._last = 0
        """The bytes of the last of them."""
        self._shape: Shape
        self._layout: _Layout

    @property
    def size(self) -> int:
        """The bytes of all segments so far."""
        return self._count * self._layout.stride if self._count else 0

    def add(self, frame: memoryview) -> bool:
        """Add a super-packet. False if its segments do not fit the batch: call take() first.

        An empty splitter takes every one that is well-formed. Raises MalformedFrame.
        """
        shape = self._read_frame(frame)
        packet, first = frame[VNET_SIZE:], self._count
        count = shape.segments(len(packet))
        if not first:
            self._shape, self._layout = shape, self._find_layout(shape, count)
        elif (
            self._last < shape.size or first + count > self._layout.rows or (shape is not self._shape and shape != self._shape)
        ):
            return False
        self._place(packet, first, count)
        self._count = first + count
        return True

    def _place(self, packet: memoryview, first: int, count: int) -> None:
        """Write everything except what take() writes for all rows at once."""
        version, protocol, transport, header, gso_size, _ = shape = self._shape
        layout, view = self._layout, self._scratch.view
        end, stride = first + count, layout.stride
        last_row = view[(end - 1) * stride :]
        last = self._last = len(packet) - (count - 1) * gso_size
        if last == shape.size:
            layout.bodies[first:end] = np.frombuffer(packet, layout.part, count, header)
        else:  # the rest of the last row must be zero, as padding and for the sums
            if count > 1:
                layout.bodies[first : end - 1] = np.frombuffer(packet, layout.part, count - 1, header)
            last_row[header:last] = packet[header + (count - 1) * gso_size :]
            last_row[last : shape.size] = bytes(shape.size - last)

        head = bytearray(packet[:header])
        _set_lengths(head, version, protocol, transport, shape.size)
        flags = 0
        if protocol == TCP:
            sequence = int.from_bytes(head[transport + 4 : transport + 8], "big")
            np.add(layout.steps[:count], sequence, out=layout.numbers[first:end])
            flags = head[transport + 13] & (FIN | PSH | CWR)
            head[transport + 13] -= flags
        layout.heads[first:end] = np.frombuffer(head, layout.head)
        if flags:
            view[first * stride + transport + 13] |= flags & CWR
            last_row[transport + 13] |= flags & (FIN | PSH)
        if last < shape.size:
            _set_lengths(last_row, version, protocol, transport, last)
        if version == 4:
            identifier = int.from_bytes(head[4:6], "big")
            head[4:6] = head[10:12] = b"\0\0"
            ids = np.arange(identifier, identifier + count) & 0xFFFF
            layout.ids[first:end] = ids
            layout.ip_checksums[first:end] = row_complements(ids, word_sum(head[:transport]))
            last_row[10:12] = b"\0\0"
            _PUT_16(last_row, 10, complement(word_sum(last_row[:transport])))

    def take(self) -> Packets | None:
        """Return and clear the batch; None if it is empty."""
        count, self._count = self._count, 0
        if not count:
            return None
        shape, layout, last = self._shape, self._layout, self._last
        if layout.padding is not None:
            layout.padding[:count] = 0
        if shape.protocol == TCP:
            layout.sequences[:count] = layout.numbers[:count].byteswap(inplace=True)
        sums = row_sums(layout.words[:count])
        transport_size = shape.size - shape.transport
        if last < shape.size:
            sums[count - 1] += swap(last - shape.transport) - swap(transport_size)
        checksums = row_complements(sums, swap(shape.pseudo) + swap(transport_size))
        if shape.protocol == UDP:
            checksums[checksums == 0] = 0xFFFF
        layout.checksums[:count] = checksums
        stride = layout.stride
        length, last = padded_length(shape.size, self._mtu), padded_length(last, self._mtu)
        rows = self._scratch.rows(0, stride, length, count)
        return Packets(self._scratch.view[: (count - 1) * stride + last], count, stride, length, last, rows)

    def _find_layout(self, shape: Shape, count: int) -> _Layout:
        layout = self._layouts.get(shape)
        if layout is None or layout.rows < count:
            stride = round_up(shape.size)
            rows = max(count, MAX_BATCH // stride)
            is_stale = self._scratch.reserve(rows * stride)
            if is_stale or len(self._layouts) >= _MAX_SHAPES:
                self._layouts.clear()
            layout = self._layouts[shape] = _Layout(self._scratch.array, shape, rows)
        return layout

    def _read_frame(self, frame: memoryview) -> Shape:
        size = packet_size(frame)
        key = None
        if frame[1] == Gso.TCPV6 and size >= 60 and frame[VNET_SIZE] >> 4 == 6 and frame[VNET_SIZE + 6] == TCP:
            key = bytes(frame[:VNET_SIZE]), bytes(frame[VNET_SIZE + 8 : VNET_SIZE + 40]), frame[VNET_SIZE + 52]
            known = self._shapes.get(key)
            if known is not None:
                return known
        shape = parse_shape(frame)
        if key is not None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        return shape


def _set_lengths(head: bytearray | memoryview, version: int, protocol: int, transport: int, size: int) -> None:
    """Write the length fields of a packet of `size` bytes, and zero in its transport checksum."""
    if version == 6:
        _PUT_16(head, 4, size - 40)
    else:
        _PUT_16(head, 2, size)
    if protocol == UDP:
        _PUT_16(head, transport + 4, size - transport)
        _PUT_16(head, transport + 6, 0)
    else:
        _PUT_16(head, transport + 16, 0)
