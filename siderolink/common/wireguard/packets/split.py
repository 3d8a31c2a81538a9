"""From what a TUN interface with offloads gives, to rows of padded packets: segmentation of TCP (TSO) and UDP (USO)."""

import struct
from typing import Final

import numpy as np

from siderolink.common.wireguard.noise.inner import padded_length
from siderolink.common.wireguard.packets.buffers import Array, Packets, Scratch, round_up
from siderolink.common.wireguard.packets.checksum import complement, row_complements, row_sums, swap, word_sum
from siderolink.common.wireguard.packets.headers import CWR, FIN, NEEDS_CSUM, PSH, TCP, UDP, VNET_HEADER, VNET_SIZE, Gso
from siderolink.common.wireguard.packets.shape import MAX_FRAME, MalformedFrame, Shape, parse_shape

MAX_FRAMES: Final = 4
"""Super-packets that are cut in one go."""
_MAX_BATCH: Final = 1 << 18
"""The bytes of all their rows; one super-packet may take more."""
_INITIAL_SIZE: Final = 1 << 16
_MAX_LAYOUTS: Final = 128
_PUT_16: Final = struct.Struct(">H").pack_into
_GET_32: Final = struct.Struct(">I").unpack_from


class _Layout:
    """The views through which all segments of several super-packets of one shape are written at once."""

    __slots__ = (
        "bodies",
        "checksums",
        "firsts",
        "frames",
        "header_bytes",
        "headers",
        "heads",
        "ids",
        "ip_checksums",
        "numbers",
        "padding",
        "part",
        "sequences",
        "starts",
        "steps",
        "stride",
        "words",
    )

    def __init__(self, array: Array, shape: Shape, frames: int) -> None:
        count, transport, header = shape.segments, shape.transport, shape.header
        size = header + shape.gso_size
        stride = self.stride = round_up(size)
        rows, block = frames * count, count * stride
        offset = 16 if shape.protocol == TCP else 6
        head, self.part = np.dtype(f"V{header}"), np.dtype(f"V{shape.gso_size}")
        self.frames = frames
        self.heads: Array = np.ndarray((frames, count), head, array, 0, (block, stride))
        self.bodies: Array = np.ndarray((frames, count - 1), self.part, array, header, (block, stride))
        self.padding: Array | None = None
        if stride > size:
            self.padding = np.ndarray((rows, stride - size), np.uint8, array, size, (stride, 1))
        self.header_bytes = memoryview(bytearray(frames * header))
        """The header of each super-packet, which its segments get."""
        self.headers: Array = np.ndarray((frames, 1), head, self.header_bytes)
        self.starts: Array = np.zeros((frames, 1), np.uint32)
        self.firsts = memoryview(self.starts.data).cast("B").cast("I")
        """The first sequence number of each super-packet, in `starts`."""
        self.steps: Array = np.arange(count, dtype=np.uint32) * np.uint32(shape.gso_size)
        self.numbers: Array = np.empty((frames, count), np.uint32)
        self.sequences: Array = np.ndarray((frames, count), "<u4", array, transport + 4, (block, stride))
        self.checksums: Array = np.ndarray((rows,), "<u2", array, transport + offset, (stride,))
        self.words: Array = np.ndarray((rows, (stride - transport) // 4), "<u4", array, transport, (stride, 4))
        self.ids: Array = np.ndarray((frames, count), ">u2", array, 4, (block, stride))
        self.ip_checksums: Array = np.ndarray((frames, count), ">u2", array, 10, (block, stride))


class Splitter:
    """Cuts super-packets into segments, several that look alike at once. What it returns is good until add() is called."""

    def __init__(self, mtu: int, max_frames: int = MAX_FRAMES) -> None:
        self._mtu = mtu
        self._max_frames = max_frames
        self._scratch = Scratch(_INITIAL_SIZE)
        self._layouts: dict[Shape, _Layout] = {}
        self._parsed: dict[tuple[bytes, bytes, int, int], tuple[Shape, int]] = {}
        """What was made of frames of TCP over IPv6, by all that it depends on: a flow's frames are mostly alike."""
        self._count = self._size = self._last = 0
        """Super-packets that were added, their length, and the payload of the last segment of each."""
        self._current: tuple[Shape, int]
        self._layout: _Layout
        self._flags: list[tuple[int, int]] = []
        """Where the header of a super-packet was put, and which flags belong to one of its segments only."""

    def split(self, frame: memoryview) -> list[Packets]:
        """Turn one frame (virtio_net_hdr and packet) into rows. Raises MalformedFrame."""
        self.add(frame)
        return self.take()

    def add(self, frame: memoryview) -> bool:
        """Take a super-packet. False if it does not look like those that are here: take() them first.

        An empty splitter takes every one that is well-formed. Raises MalformedFrame.
        """
        parsed = self._parse(frame)
        packet, index = frame[VNET_SIZE:], self._count
        shape = parsed[0]
        if not index:
            self._current, self._size = parsed, len(packet)
            self._layout = self._find_layout(shape)
            self._last = len(packet) - shape.header - (shape.segments - 1) * shape.gso_size
        elif (
            len(packet) != self._size
            or index >= self._layout.frames
            or (parsed is not self._current and parsed != self._current)
        ):
            return False
        self._place(packet, shape, index)
        self._count = index + 1
        return True

    def _place(self, packet: memoryview, shape: Shape, index: int) -> None:
        """Write what differs from one super-packet to the next."""
        version, protocol, transport, header, gso_size, count = shape
        layout, view, last = self._layout, self._scratch.view, self._last
        if count > 1:
            layout.bodies[index] = np.frombuffer(packet, layout.part, count - 1, header)
        last_body = ((index + 1) * count - 1) * layout.stride + header
        view[last_body : last_body + last] = packet[len(packet) - last :]
        if last < gso_size:  # zero, as padding and for the sums
            view[last_body + last : last_body + gso_size] = bytes(gso_size - last)
        head = layout.header_bytes[index * header : (index + 1) * header]
        head[:] = packet[:header]
        _set_lengths(head, version, protocol, transport, header + gso_size)
        if protocol == TCP:
            layout.firsts[index] = _GET_32(packet, transport + 4)[0]
            flags = head[transport + 13] & (FIN | PSH | CWR)
            if flags:
                head[transport + 13] -= flags
                self._flags.append((index, flags))

    def take(self) -> list[Packets]:
        """All segments so far, in order, in batches of rows of one length but for the last; none if there is nothing."""
        frames = self._count
        if not frames:
            return []
        self._count = 0
        shape, pseudo = self._current
        layout = self._layout
        rows, size = frames * shape.segments, shape.header + shape.gso_size
        if layout.padding is not None:
            layout.padding[:rows] = 0
        self._write_headers(frames, shape)
        transport_size = size - shape.transport
        sums = row_sums(layout.words[:rows])
        if self._last < shape.gso_size:
            last_size = transport_size - shape.gso_size + self._last
            sums[shape.segments - 1 :: shape.segments] += swap(last_size) - swap(transport_size)
        checksums = row_complements(sums, swap(pseudo) + swap(transport_size))
        if shape.protocol == UDP:
            checksums[checksums == 0] = 0xFFFF
        layout.checksums[:rows] = checksums
        return self._batches(frames, shape)

    def _write_headers(self, frames: int, shape: Shape) -> None:
        """All but the transport's checksums."""
        version, protocol, transport, header, gso_size, count = shape
        layout, view, last = self._layout, self._scratch.view, self._last
        stride = layout.stride
        block = count * stride
        layout.heads[:frames] = layout.headers[:frames]
        if protocol == TCP:
            numbers = np.add(layout.starts[:frames], layout.steps, out=layout.numbers[:frames])
            layout.sequences[:frames] = numbers.byteswap(inplace=True)
            for index, flags in self._flags:
                view[index * block + transport + 13] |= flags & CWR
                view[(index + 1) * block - stride + transport + 13] |= flags & (FIN | PSH)
            self._flags.clear()
        if last < gso_size:
            for end in range(block, frames * block + 1, block):
                _set_lengths(view[end - stride :], version, protocol, transport, header + last)
        if version == 4:
            for index in range(frames):
                _number_ipv4(view[index * block :], view[(index + 1) * block - stride :], layout, index)

    def _batches(self, frames: int, shape: Shape) -> list[Packets]:
        stride, count = self._layout.stride, shape.segments
        length = padded_length(shape.header + shape.gso_size, self._mtu)
        last = padded_length(shape.header + self._last, self._mtu)
        rows = self._scratch.rows(0, stride, length, frames * count)
        step = count if last < length else frames * count
        return [
            Packets(
                self._scratch.view[first * stride : (first + step - 1) * stride + last],
                step,
                stride,
                length,
                last,
                rows[first:] if first else rows,
            )
            for first in range(0, frames * count, step)
        ]

    def _find_layout(self, shape: Shape) -> _Layout:
        layout = self._layouts.get(shape)
        if layout is None:
            block = shape.segments * round_up(shape.header + shape.gso_size)
            frames = max(1, min(self._max_frames, _MAX_BATCH // block))
            is_stale = self._scratch.reserve(frames * block)
            if is_stale or len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[shape] = _Layout(self._scratch.array, shape, frames)
        return layout

    def _parse(self, frame: memoryview) -> tuple[Shape, int]:
        """The shape of a super-packet, and the sum of its pseudo-header without the length."""
        if not VNET_SIZE + 20 <= len(frame) <= MAX_FRAME:
            raise MalformedFrame(f"a frame of {len(frame)} bytes")
        flags, gso_type, _, gso_size, csum_start, _ = VNET_HEADER.unpack_from(frame)
        key = None
        if gso_type == Gso.TCPV6 and len(frame) >= VNET_SIZE + 60 and frame[VNET_SIZE + 6] == TCP:
            # all but the version, the traffic class and the flow label, so that flows have it in common
            key = bytes(frame[:VNET_SIZE]), bytes(frame[VNET_SIZE + 4 : VNET_SIZE + 40]), frame[VNET_SIZE + 52], len(frame)
        parsed = self._parsed.get(key) if key and frame[VNET_SIZE] >> 4 == 6 else None
        if parsed is None:
            packet = frame[VNET_SIZE:]
            parsed = parse_shape(packet, gso_type, gso_size, csum_start if flags & NEEDS_CSUM else None)
            if key:
                if len(self._parsed) >= _MAX_LAYOUTS:
                    self._parsed.clear()
                self._parsed[key] = parsed
        return parsed


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


def _number_ipv4(first: memoryview, last: memoryview, layout: _Layout, index: int) -> None:
    """Count the IDs of one super-packet's segments up from its own and write the header checksums."""
    head = bytearray(first[: (first[0] & 15) * 4])
    identifier = int.from_bytes(head[4:6], "big")
    head[4:6] = head[10:12] = b"\0\0"
    ids = np.arange(identifier, identifier + layout.ids.shape[1]) & 0xFFFF
    layout.ids[index] = ids
    layout.ip_checksums[index] = row_complements(ids, word_sum(head))
    last[10:12] = b"\0\0"
    _PUT_16(last, 10, complement(word_sum(last[: len(head)])))
