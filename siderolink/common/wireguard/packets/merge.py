"""From opened rows to what a TUN interface with offloads takes: runs of one flow become one super-packet.

A run is merged only if cutting it again gives the very same packets: equal headers, sequence numbers (and IPv4 IDs) in
steps, full segments but for the last, and right checksums. Whatever does not fit goes on alone, untouched and in order.
"""

import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

import numpy as np

from siderolink.common.wireguard.noise.drops import Drop
from siderolink.common.wireguard.packets.buffers import Array, Bytes
from siderolink.common.wireguard.packets.checksum import (
    MODULUS,
    complement,
    pseudo_header_sum,
    row_sums,
    swap,
    word_sum,
)
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
    total_length,
)
from siderolink.common.wireguard.packets.seal import Opened

MAX_RUN: Final = 512
"""Rows of a super-packet: each is one buffer of a writev, of which Linux takes 1,024."""
MAX_UDP_RUN: Final = 64
"""The same for UDP: Linux refuses a super-packet of more than 128 datagrams, before 6.9 of more than 64."""
_MAX_TOTAL: Final = 65535
_PUT_16: Final = struct.Struct(">H").pack_into
_PUT_32: Final = struct.Struct(">I").pack_into

Refuse = Callable[[bytes, bytes], Drop | None]
"""Why packets with this source and destination (4 or 16 bytes each) may not pass; None if they may."""
OnDrop = Callable[[Drop, int], None]


class Merger:
    """Makes frames for one interface."""

    def __init__(self, on_drop: OnDrop, *, tso: bool = True, uso: bool = False) -> None:
        """`tso` and `uso`: whether the interface takes super-packets of TCP and of UDP."""
        self._on_drop = on_drop
        self._tso = tso
        self._uso = uso

    def merge(self, opened: Opened, refuse: Refuse) -> Iterator[list[Bytes]]:
        """The buffers of each frame, for one writev each; they are good until the opener is called again.

        `refuse` is asked once for each pair of addresses. Keepalives are passed over in silence.
        """
        count, stride, good, view = opened.count, opened.stride, opened.good, opened.scratch.view
        refusals: dict[bytes, Drop | None] = {}
        row = 0
        while row < count:
            start = row * stride
            size = opened.last if row == count - 1 else opened.length
            step = 1
            if good[row] and size:
                packet = view[start : start + size]
                total = self._admitted_length(packet, refuse, refusals)
                if total:
                    inner = self._mergeable(packet, total) if row + 1 < count else None
                    step = _run_length(opened, row, inner) if inner else 1
                    if inner and step > 1:
                        yield _merge_run(opened, row, step, inner)
                    else:
                        yield [PLAIN_VNET_HEADER, packet[:total]]
            row += step

    def _admitted_length(self, packet: memoryview, refuse: Refuse, refusals: dict[bytes, Drop | None]) -> int:
        """The packet's length without padding, or 0 if it is dropped."""
        total = total_length(packet, len(packet))
        if total is None:
            self._on_drop(Drop.INNER_MALFORMED, 1)
            return 0
        pair = bytes(packet[8:40] if packet[0] >> 4 == 6 else packet[12:20])
        if pair not in refusals:
            half = len(pair) // 2
            refusals[pair] = refuse(pair[:half], pair[half:])
        refusal = refusals[pair]
        if refusal is not None:
            self._on_drop(refusal, 1)
            return 0
        return total

    def _mergeable(self, packet: memoryview, total: int) -> Inner | None:
        """What is in the packet if it could begin a run."""
        if 60 <= total <= 100 and packet[6] == TCP and total == 40 + (packet[52] >> 4) * 4 and packet[0] >> 4 == 6:
            return None  # an acknowledgement over IPv6, which is half of all packets of a transfer
        inner = parse_inner(packet, total)
        if inner is None or inner.header == total:
            return None
        if inner.protocol == UDP:
            return inner if self._uso and any(packet[inner.transport + 6 : inner.transport + 8]) else None
        flags = packet[inner.transport + 13] & (FIN | SYN | RST | PSH | ACK | URG)
        return inner if self._tso and flags == ACK else None


def _run_length(opened: Opened, first: int, inner: Inner) -> int:
    """How many rows from `first` on make one super-packet; 1 if its neighbour or its own checksum does not fit."""
    view, stride = opened.scratch.view, opened.stride
    packet = view[first * stride :]
    expected = bytearray(packet[: inner.header])
    if inner.protocol == TCP:
        expected[inner.transport + 13] &= ~CWR
    room = min(MAX_UDP_RUN if inner.protocol == UDP else MAX_RUN, (_MAX_TOTAL - inner.header) // (inner.total - inner.header))
    limit = min(opened.count, first + room)
    if False in opened.good[first:limit]:
        limit = first + opened.good[first:limit].index(False)
    if limit - first < 2 or not _same_flow(packet, packet[stride:], inner):
        return 1
    # The last row may be shorter than a full packet, with what an earlier batch left behind it.
    full_limit = limit - 1 if limit == opened.count and inner.total > opened.last else limit
    full = 1 + _equal_rows(opened, first, full_limit, inner, expected) if full_limit - first > 1 else 1
    tail = first + full
    has_tail = tail < limit and _is_tail(opened, tail, full, inner, expected)
    valid = _valid_rows(opened, first, full, inner)
    if valid < full:
        return max(valid, 1)
    return full + 1 if has_tail and _is_valid(view[tail * stride :], inner) else full


def _same_flow(packet: memoryview, other: memoryview, inner: Inner) -> bool:
    """A quick look at the neighbour, so that single packets do not pay for column operations."""
    start = 8 if inner.version == 6 else 12
    end = inner.transport + 4
    return packet[start:end] == other[start:end] and packet[0] == other[0]


@lru_cache(maxsize=64)
def _steps(size: int) -> Array:
    return np.arange(1, MAX_RUN + 1, dtype=np.uint32) * np.uint32(size)


def _equal_rows(opened: Opened, first: int, limit: int, inner: Inner, expected: bytearray) -> int:
    """How many rows after `first` are full segments that continue it, by their headers."""
    scratch, stride = opened.scratch, opened.stride
    version, protocol, transport, header, total = inner
    count = limit - first - 1
    heads = scratch.matrix(0, stride, header // 4)[first + 1 : limit].copy()
    words = heads.view("<u2")
    words[:, (transport + (16 if protocol == TCP else 6)) // 2] = 0
    checksums = scratch.column(transport + 6, stride, "<u2")[first + 1 : limit] if protocol == UDP else None
    wanted = bytearray(expected)
    if protocol == TCP:
        sequence = np.uint32(int.from_bytes(expected[transport + 4 : transport + 8], "big"))
        heads[:, transport // 4 + 1] ^= (_steps(total - header)[:count] + sequence).byteswap()
        wanted[transport + 4 : transport + 8] = bytes(4)
        wanted[transport + 16 : transport + 18] = b"\0\0"
    else:
        wanted[transport + 6 : transport + 8] = b"\0\0"
    if version == 4:
        words[:, 2] ^= (_steps(1)[:count] + np.uint32(expected[4] << 8 | expected[5])).astype(np.uint16).byteswap()
        words[:, 5] = 0
        wanted[4:6] = wanted[10:12] = b"\0\0"
    if heads.tobytes() == bytes(wanted) * count and (checksums is None or checksums.all()):
        return count
    wrong = (heads != np.frombuffer(wanted, "<u4")).any(axis=1)
    if checksums is not None:
        wrong |= checksums == 0
    return _before_first(wrong)


def _before_first(wrong: Array) -> int:
    """How many rows there are before the first one that is wrong."""
    at = int(wrong.argmax())
    return at if wrong[at] else wrong.size


def _is_tail(opened: Opened, row: int, position: int, inner: Inner, expected: bytearray) -> bool:
    """Whether a row can end the run: like the others, but it may be shorter, and carry PSH and FIN."""
    view = opened.scratch.view
    version, protocol, transport, header, total = inner
    start = row * opened.stride
    size = opened.last if row == opened.count - 1 else opened.length
    if size < header:
        return False
    packet = view[start : start + size]
    length = 40 + int.from_bytes(packet[4:6], "big") if version == 6 else int.from_bytes(packet[2:4], "big")
    if not header < length <= min(total, size):
        return False
    wanted = bytearray(expected)
    _set_length(wanted, version, length)
    if version == 4:
        _PUT_16(wanted, 4, (int.from_bytes(expected[4:6], "big") + position) & 0xFFFF)
        wanted[10:12] = packet[10:12]
    if protocol == TCP:
        sequence = int.from_bytes(expected[transport + 4 : transport + 8], "big") + position * (total - header)
        _PUT_32(wanted, transport + 4, sequence & 0xFFFFFFFF)
        wanted[transport + 13] |= packet[transport + 13] & (FIN | PSH)
        wanted[transport + 16 : transport + 18] = packet[transport + 16 : transport + 18]
    else:
        _PUT_16(wanted, transport + 4, length - transport)
        wanted[transport + 6 : transport + 8] = packet[transport + 6 : transport + 8]
        if not any(packet[transport + 6 : transport + 8]):
            return False
    return wanted == packet[:header]


def _valid_rows(opened: Opened, first: int, count: int, inner: Inner) -> int:
    """How many of the full segments from `first` on have right checksums, up to the first that has not."""
    scratch, stride = opened.scratch, opened.stride
    transport, total = inner.transport, inner.total
    limit = first + count
    if total < stride:  # the sums go over whole rows
        scratch.matrix(total, stride, stride - total, "u1")[first:limit] = 0
    pseudo = pseudo_header_sum(scratch.view[first * stride :][:40], inner.version, inner.protocol)
    wrong = row_sums(scratch.matrix(transport, stride, (stride - transport) // 4)[first:limit])
    wrong += swap(pseudo) + swap(total - transport)
    wrong %= MODULUS
    if inner.version == 4:
        wrong |= row_sums(scratch.matrix(0, stride, transport // 4)[first:limit]) % MODULUS
    return _before_first(wrong != 0) if np.count_nonzero(wrong) else count


def _is_valid(packet: memoryview, inner: Inner) -> bool:
    """The same for one segment, whose own length counts."""
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
