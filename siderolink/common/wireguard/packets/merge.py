"""Turns decrypted packets into frames for a TUN interface with offloads: runs of one flow become one super-packet.

A run is merged only if splitting it again would give exactly the same packets: equal headers, consecutive sequence numbers
(and IPv4 IDs), full segments except the last, and valid checksums. Everything else passes alone, unchanged and in order.
"""

import struct
from collections.abc import Iterator
from typing import Final, cast

from siderolink.common.wireguard.noise.routing import InnerFilter, inner_header
from siderolink.common.wireguard.noise.rows import Opened as AnyOpened
from siderolink.common.wireguard.packets.buffers import Bytes
from siderolink.common.wireguard.packets.checksum import MODULUS, complement, pseudo_header_sum, word_sum
from siderolink.common.wireguard.packets.headers import (
    ACK,
    CWR,
    FIN,
    NEEDS_CSUM,
    PLAIN_VNET_HEADER,
    PSH,
    RST,
    SYN,
    TCP,
    UDP,
    URG,
    VNET_HEADER,
    Gso,
    Inner,
    parse_inner,
)
from siderolink.common.wireguard.packets.parts import PacketInterface
from siderolink.common.wireguard.packets.runs import Continuity
from siderolink.common.wireguard.packets.seal import Opened

MAX_RUN: Final = 512
"""Rows of a super-packet. Each is one buffer of a writev, which accepts 1,024 on Linux."""
MAX_UDP_RUN: Final = 64
"""The same for UDP: Linux refuses a super-packet of more than 128 datagrams, before 6.9 of more than 64."""
_MAX_TOTAL: Final = 65535
_PUT_16: Final = struct.Struct(">H").pack_into
_PUT_32: Final = struct.Struct(">I").pack_into


class Merger:
    """Creates the frames for one interface."""

    def __init__(self, *, tso: bool = True, uso: bool = False) -> None:
        """`tso` and `uso`: whether the interface accepts super-packets of TCP and of UDP."""
        self._tso = tso
        self._uso = uso

    def merge(self, opened: AnyOpened, inner_filter: InnerFilter) -> Iterator[list[Bytes]]:
        """Yield the buffers of each frame, for one writev each; they are valid until the next batch is opened.

        The filter decides about each packet that may begin a frame. Keepalives are skipped and not counted.
        """
        opened = cast("Opened", opened)
        count, stride, good, view = opened.count, opened.stride, opened.good, opened.scratch.view
        seen: dict[tuple[Inner, bytes], Continuity] = {}
        row = 0
        while row < count:
            start = row * stride
            size = opened.last if row == count - 1 else opened.length
            step = 1
            if good[row] and size:
                packet = view[start : start + size]
                admitted = inner_filter.admit(packet)
                if admitted is not None:
                    pair, total = admitted
                    inner = self._mergeable(packet, total) if row + 1 < count else None
                    step = _run_length(opened, row, inner, pair, seen) if inner else 1
                    if inner and step > 1:
                        yield _merge_run(opened, row, step, inner)
                    else:
                        yield [PLAIN_VNET_HEADER, packet[:total]]
            row += step

    def deliver(self, opened: AnyOpened, inner_filter: InnerFilter, interface: PacketInterface) -> None:
        for buffers in self.merge(opened, inner_filter):
            interface.write(buffers)

    def _mergeable(self, packet: memoryview, total: int) -> Inner | None:
        """The packet's offsets if it could begin a run."""
        if 60 <= total <= 100 and packet[6] == TCP and total == 40 + (packet[52] >> 4) * 4 and packet[0] >> 4 == 6:
            return None  # an acknowledgement over IPv6, which is half of all packets of a transfer
        inner = parse_inner(packet, total)
        if inner is None or inner.header == total:
            return None
        if inner.protocol == UDP:
            return inner if self._uso and any(packet[inner.transport + 6 : inner.transport + 8]) else None
        flags = packet[inner.transport + 13] & (FIN | SYN | RST | PSH | ACK | URG)
        return inner if self._tso and flags == ACK else None


def _run_length(opened: Opened, first: int, inner: Inner, pair: bytes, seen: dict[tuple[Inner, bytes], Continuity]) -> int:
    """How many rows from `first` on form one super-packet; 1 if the next does not continue it or its own checksum is wrong.

    `seen` caches results for the batch; `pair` is the packet's addresses.
    """
    view, stride = opened.scratch.view, opened.stride
    packet = view[first * stride :]
    if not _same_flow(packet, packet[stride:], inner):
        return 1
    room = min(MAX_UDP_RUN if inner.protocol == UDP else MAX_RUN, (_MAX_TOTAL - inner.header) // (inner.total - inner.header))
    if first + 2 < opened.count or opened.last >= inner.total:
        known = seen.get((inner, pair))
        full = known.run(first, room) if known else None
        if full is None:
            known = seen[inner, pair] = Continuity(opened, first, inner)
            full = known.run(first, room) or 0
    else:
        full = int(_is_valid(packet, inner))
    tail = first + full
    if 0 < full < room and tail < opened.count and _is_short_tail(opened, first, tail, inner):
        return full + 1
    return max(full, 1)


def _same_flow(packet: memoryview, other: memoryview, inner: Inner) -> bool:
    """Compare with the next row first, so that single packets do not pay for column operations."""
    start = 8 if inner.version == 6 else 12
    end = inner.transport + 4
    return packet[start:end] == other[start:end] and packet[0] == other[0]


def _is_short_tail(opened: Opened, first: int, row: int, inner: Inner) -> bool:
    """Whether a shorter row can end the run: its headers must continue it, and it may carry PSH and FIN."""
    view, stride = opened.scratch.view, opened.stride
    version, protocol, transport, header, total = inner
    size = opened.last if row == opened.count - 1 else opened.length
    packet = view[row * stride : row * stride + size]
    found = inner_header(packet) if opened.good[row] else None
    if found is None or not header < found[1] < total:
        return False
    length = found[1]
    position = row - first
    wanted = bytearray(view[first * stride :][:header])
    _set_length(wanted, version, length)
    if version == 4:
        _PUT_16(wanted, 4, (int.from_bytes(wanted[4:6], "big") + position) & 0xFFFF)
        wanted[10:12] = packet[10:12]
    if protocol == TCP:
        if view[(row - 1) * stride + transport + 13] & (FIN | PSH):
            return False
        sequence = int.from_bytes(wanted[transport + 4 : transport + 8], "big") + position * (total - header)
        _PUT_32(wanted, transport + 4, sequence & 0xFFFFFFFF)
        wanted[transport + 13] = wanted[transport + 13] & ~CWR | packet[transport + 13] & (FIN | PSH)
        wanted[transport + 16 : transport + 18] = packet[transport + 16 : transport + 18]
    else:
        _PUT_16(wanted, transport + 4, length - transport)
        wanted[transport + 6 : transport + 8] = packet[transport + 6 : transport + 8]
        if not any(packet[transport + 6 : transport + 8]):
            return False
    return wanted == packet[:header] and _is_valid(packet, inner)


def _is_valid(packet: memoryview, inner: Inner) -> bool:
    """Whether one segment's checksums are valid, by its own length."""
    transport = inner.transport
    if inner.version == 6:
        total = 40 + int.from_bytes(packet[4:6], "big")
    else:
        total = int.from_bytes(packet[2:4], "big")
        if word_sum(packet[:transport]):
            return False
    pseudo = pseudo_header_sum(packet, inner.version, inner.protocol)
    return (word_sum(packet[transport:total]) + pseudo + total - transport) % MODULUS == 0


def _merge_run(opened: Opened, first: int, count: int, inner: Inner) -> list[Bytes]:
    """One super-packet with a partial checksum: virtio_net_hdr, headers, and the payload of each row."""
    view, stride = opened.scratch.view, opened.stride
    version, protocol, transport, header, total = inner
    size = total - header
    packet = view[first * stride :]
    tail = view[(first + count - 1) * stride :]
    tail_total = 40 + int.from_bytes(tail[4:6], "big") if version == 6 else int.from_bytes(tail[2:4], "big")
    merged = header + (count - 1) * size + tail_total - header

    head = bytearray(packet[:header])
    _set_length(head, version, merged)
    pseudo = (pseudo_header_sum(head, version, protocol) + merged - transport) % MODULUS
    if protocol == TCP:
        gso_type = int(Gso.TCPV6 if version == 6 else Gso.TCPV4)
        if head[transport + 13] & CWR:
            gso_type |= Gso.ECN
        head[transport + 13] |= tail[transport + 13] & (FIN | PSH)
        offset = 16
    else:
        gso_type, offset = int(Gso.UDP_L4), 6
        _PUT_16(head, transport + 4, merged - transport)
    _PUT_16(head, transport + offset, pseudo)
    if version == 4:
        head[10:12] = b"\0\0"
        _PUT_16(head, 10, complement(word_sum(head[:transport])))
    vnet = VNET_HEADER.pack(NEEDS_CSUM, gso_type, header, size, transport, offset)
    rows = opened.scratch.rows(header, stride, size, first + count)
    return [vnet, head, *rows[first : first + count - 1], tail[header:tail_total]]


def _set_length(head: bytearray, version: int, total: int) -> None:
    if version == 6:
        _PUT_16(head, 4, total - 40)
    else:
        _PUT_16(head, 2, total)
