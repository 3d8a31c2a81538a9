"""From what a TUN interface with offloads gives, to rows of padded packets: segmentation of TCP (TSO) and UDP (USO)."""

import struct
from typing import Final, NamedTuple

import numpy as np

from siderolink.common.wireguard.noise.inner import padded_length
from siderolink.common.wireguard.packets.buffers import Array, Packets, Scratch, round_up
from siderolink.common.wireguard.packets.checksum import (
    MODULUS,
    complement,
    complete_checksum,
    pseudo_header_sum,
    row_complements,
    row_sums,
    swap,
    word_sum,
)
from siderolink.common.wireguard.packets.headers import (
    CWR,
    FIN,
    NEEDS_CSUM,
    PSH,
    TCP,
    UDP,
    VNET_HEADER,
    VNET_SIZE,
    Gso,
)

MAX_FRAME: Final = VNET_SIZE + 65535 + 40
"""No IP packet is longer, so no frame is."""
MAX_SEGMENTS: Final = 2048
"""Linux lets no TCP segment go below 48 bytes of payload by default, which makes 1,366."""
MAX_BYTES: Final = 1 << 19
"""All rows of one super-packet; those 1,366 segments with the longest headers take 240 KiB."""
_INITIAL_SIZE: Final = 1 << 16
_MAX_LAYOUTS: Final = 128
_PUT_16: Final = struct.Struct(">H").pack_into
_ZEROS: Final = bytes(16)


class MalformedFrame(ValueError):
    """Raised when a frame from the interface contradicts itself; it was not for us to repair."""


class _Shape(NamedTuple):
    """What one super-packet looks like; equal shapes share their views."""

    version: int
    protocol: int
    transport: int
    header: int
    gso_size: int
    segments: int


class _Layout:
    """The views through which all segments of one shape are written at once."""

    __slots__ = (
        "body",
        "checksums",
        "head",
        "heads",
        "ids",
        "ip_checksums",
        "numbers",
        "padding",
        "part",
        "sequences",
        "steps",
        "stride",
        "words",
    )

    def __init__(self, array: Array, shape: _Shape) -> None:
        count, transport, header = shape.segments, shape.transport, shape.header
        size = header + shape.gso_size
        stride = self.stride = round_up(size)
        offset = 16 if shape.protocol == TCP else 6
        self.head, self.part = np.dtype(f"V{header}"), np.dtype(f"V{shape.gso_size}")
        self.heads: Array = np.ndarray((count,), self.head, array, 0, (stride,))
        self.body: Array = np.ndarray((count - 1,), self.part, array, header, (stride,))
        self.padding: Array | None = None
        if stride > size:
            self.padding = np.ndarray((count, stride - size), np.uint8, array, size, (stride, 1))
        self.sequences: Array = np.ndarray((count,), "<u4", array, transport + 4, (stride,))
        self.steps: Array = np.arange(count, dtype=np.uint32) * np.uint32(shape.gso_size)
        self.numbers: Array = np.empty(count, np.uint32)
        self.checksums: Array = np.ndarray((count,), "<u2", array, transport + offset, (stride,))
        self.words: Array = np.ndarray((count, (stride - transport) // 4), "<u4", array, transport, (stride, 4))
        self.ids: Array = np.ndarray((count,), ">u2", array, 4, (stride,))
        self.ip_checksums: Array = np.ndarray((count,), ">u2", array, 10, (stride,))


class Splitter:
    """Cuts frames into segments. What it returns is good until it is called again."""

    def __init__(self, mtu: int) -> None:
        self._mtu = mtu
        self._scratch = Scratch(_INITIAL_SIZE)
        self._layouts: dict[_Shape, _Layout] = {}
        self._parsed: dict[tuple[int, bytes, int], tuple[_Shape, int]] = {}
        """What was made of frames of TCP over IPv6, by all that it depends on: a flow's frames are mostly alike."""

    def split(self, frame: memoryview) -> Packets:
        """Turn one frame (virtio_net_hdr and packet) into rows. Raises MalformedFrame."""
        if not VNET_SIZE + 20 <= len(frame) <= MAX_FRAME:
            raise MalformedFrame(f"a frame of {len(frame)} bytes")
        flags, gso_type, _, gso_size, csum_start, csum_offset = VNET_HEADER.unpack_from(frame)
        if gso_type == Gso.NONE:
            size = len(frame) - VNET_SIZE
            self._scratch.reserve(round_up(size))
            length = place_packet(frame, self._scratch.view, self._mtu)
            return Packets(self._scratch.view[:length], 1, length, length, length, (self._scratch.view[:length],))
        packet = frame[VNET_SIZE:]
        key = None
        if gso_type == Gso.TCPV6 and len(packet) >= 60 and packet[6] == TCP:
            key = len(frame), bytes(frame[: VNET_SIZE + 40]), packet[52]
        parsed = self._parsed.get(key) if key else None
        if parsed is None:
            parsed = _parse(packet, gso_type, gso_size, csum_start if flags & NEEDS_CSUM else None)
            if key:
                if len(self._parsed) >= _MAX_LAYOUTS:
                    self._parsed.clear()
                self._parsed[key] = parsed
        return self._segment(packet, *parsed)

    def _layout(self, shape: _Shape) -> _Layout:
        layout = self._layouts.get(shape)
        if layout is None:
            is_stale = self._scratch.reserve(shape.segments * round_up(shape.header + shape.gso_size))
            if is_stale or len(self._layouts) >= _MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[shape] = _Layout(self._scratch.array, shape)
        return layout

    def _segment(self, packet: memoryview, shape: _Shape, pseudo: int) -> Packets:
        version, protocol, transport, header, gso_size, count = shape
        layout = self._layout(shape)
        stride = layout.stride
        view = self._scratch.view
        last_payload = len(packet) - header - (count - 1) * gso_size
        last_row = (count - 1) * stride
        last_end = last_row + header + last_payload

        # The payload first; what follows it in each row must be zero, as padding and for the sums.
        if count > 1:
            layout.body[:] = np.frombuffer(packet, layout.part, count - 1, header)
        view[last_row + header : last_end] = packet[len(packet) - last_payload :]
        if layout.padding is not None:
            layout.padding[:] = 0
        if last_payload < gso_size:
            view[last_end : last_row + header + gso_size] = bytes(gso_size - last_payload)

        head = bytearray(packet[:header])
        size = header + gso_size
        _set_lengths(head, version, protocol, transport, size)
        flags = 0
        if protocol == TCP:
            flags = head[transport + 13]
            head[transport + 13] = flags & ~(FIN | PSH | CWR)
        layout.heads[:] = np.frombuffer(head, layout.head)
        if protocol == TCP:
            np.add(layout.steps, int.from_bytes(head[transport + 4 : transport + 8], "big"), out=layout.numbers)
            layout.sequences[:] = layout.numbers.byteswap(inplace=True)
            view[transport + 13] |= flags & CWR
            view[last_row + transport + 13] |= flags & (FIN | PSH)
        if last_payload < gso_size:
            _set_lengths(view[last_row:], version, protocol, transport, header + last_payload)
        if version == 4:
            _number_ipv4(head, layout, view[last_row:])

        sums = row_sums(layout.words)
        if last_payload < gso_size:
            sums[count - 1] += swap(header + last_payload - transport) - swap(size - transport)
        checksums = row_complements(sums, swap(pseudo) + swap(size - transport))
        if protocol == UDP:
            checksums[checksums == 0] = 0xFFFF
        layout.checksums[:] = checksums

        length, last = padded_length(size, self._mtu), padded_length(header + last_payload, self._mtu)
        rows = self._scratch.rows(0, stride, length, count)
        return Packets(view[: last_row + last], count, stride, length, last, rows)


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


def _parse(packet: memoryview, gso_type: int, gso_size: int, csum_start: int | None) -> tuple[_Shape, int]:
    """The shape of a super-packet, and the sum of its pseudo-header without the length."""
    kind = gso_type & ~Gso.ECN
    version = packet[0] >> 4
    if kind == Gso.UDP_L4 and gso_type == kind and version in (4, 6):
        protocol = UDP
    elif (kind == Gso.TCPV4 and version == 4) or (kind == Gso.TCPV6 and version == 6):
        protocol = TCP
    else:
        raise MalformedFrame(f"GSO type {gso_type:#x} for IP version {version}")
    transport, pseudo = _find_transport(packet, version, protocol, csum_start)
    if len(packet) < transport + (20 if protocol == TCP else 8):
        raise MalformedFrame("the transport header is cut off")
    header = transport + ((packet[transport + 12] >> 4) * 4 if protocol == TCP else 8)
    payload = len(packet) - header
    if header < transport + 8 or (protocol == TCP and header < transport + 20) or payload < 1:
        raise MalformedFrame("the transport header does not fit the packet")
    if csum_start not in (None, transport):
        raise MalformedFrame("the checksum does not start at the transport header")
    count = -(-payload // gso_size) if gso_size else 0
    if header + gso_size > 65535 or not 1 <= count <= MAX_SEGMENTS or count * round_up(header + gso_size) > MAX_BYTES:
        raise MalformedFrame(f"{payload} bytes in segments of {gso_size}")
    return _Shape(version, protocol, transport, header, gso_size, count), pseudo


def _find_transport(packet: memoryview, version: int, protocol: int, csum_start: int | None) -> tuple[int, int]:
    if version == 4:
        transport = (packet[0] & 15) * 4
        if transport < 20 or packet[9] != protocol or packet[6] & 0x3F or packet[7]:
            raise MalformedFrame("an IPv4 header that cannot be segmented")
        if len(packet) < transport:
            raise MalformedFrame("the IPv4 header is cut off")
        return transport, pseudo_header_sum(packet, 4, protocol)
    if len(packet) < 40:
        raise MalformedFrame("the IPv6 header is cut off")
    if packet[6] == protocol:
        return 40, pseudo_header_sum(packet, 6, protocol)
    # Behind extension headers: the kernel says where, and its partial checksum holds the pseudo-header's sum.
    field = 16 if protocol == TCP else 6
    if csum_start is None or csum_start < 48 or csum_start % 4 or csum_start + field + 2 > len(packet):
        raise MalformedFrame("IPv6 extension headers without a place for the checksum")
    partial = int.from_bytes(packet[csum_start + field : csum_start + field + 2], "big")
    return csum_start, (partial - (len(packet) - csum_start)) % MODULUS


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


def _number_ipv4(head: bytearray, layout: _Layout, last: memoryview) -> None:
    """Count the IDs up from the super-packet's own and write the header checksums."""
    identifier = int.from_bytes(head[4:6], "big")
    header = (head[0] & 15) * 4
    head[4:6] = head[10:12] = b"\0\0"
    count = layout.ids.size
    ids = np.arange(identifier, identifier + count) & 0xFFFF
    layout.ids[:] = ids
    layout.ip_checksums[:] = row_complements(ids, word_sum(head[:header]))
    last[10:12] = b"\0\0"
    _PUT_16(last, 10, complement(word_sum(last[:header])))
