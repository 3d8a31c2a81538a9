"""Builds the ICMP error for a packet whose destination no peer has (RFC 792; RFC 4443, 3.1): its sender fails fast.

Like the kernel's WireGuard: "host unreachable" over IPv4, "address unreachable" over IPv6. The error's source is the address
that is unreachable, because a host drops incoming packets with one of its own addresses as source.
"""

import struct
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from siderolink.common.wireguard.packets.buffers import Bytes
from siderolink.common.wireguard.packets.checksum import complement, word_sum
from siderolink.common.wireguard.packets.headers import TCP, UDP

__all__ = ["unreachable"]

_ICMP, _ICMPV6 = 1, 58
_ECHO: Final = {_ICMP: 8, _ICMPV6: 128}
_LARGEST: Final = {4: 576, 6: 1280}
"""Bytes of the whole error (RFC 1812, 4.3.2.3; RFC 4443, 2.4)."""
_ERROR: Final = struct.Struct(">BBHI")
_HEADER_4: Final = struct.Struct(">BBHHHBBH4s4s")
_HEADER_6: Final = struct.Struct(">IHBB16s16s")
_HOPS: Final = 64
_NETWORK_CONTROL: Final = 0xC0


def unreachable(packet: Bytes) -> bytes | None:
    """The error for an IP packet with a whole header; None where there may be none (RFC 1122, 3.2.2; RFC 4443, 2.4).

    Only TCP, UDP and echo requests between two single hosts are answered, and only where a packet's first part is there.
    """
    return _unreachable_6(packet) if packet[0] >> 4 == 6 else _unreachable_4(packet)


def _unreachable_4(packet: Bytes) -> bytes | None:
    source, destination = bytes(packet[12:16]), bytes(packet[16:20])
    start = (packet[0] & 15) * 4
    is_later_part = packet[6] & 0x1F or packet[7]
    if is_later_part or not _is_answered(packet, packet[9], start) or not all(map(_is_host_4, (source, destination))):
        return None
    quoted = bytes(packet[: _LARGEST[4] - _HEADER_4.size - _ERROR.size])
    error = _ERROR.pack(3, 1, complement(0x0301 + word_sum(quoted)), 0) + quoted
    fields = (0x45, _NETWORK_CONTROL, _HEADER_4.size + len(error), 0, 0, _HOPS, _ICMP)
    checksum = complement(word_sum(_HEADER_4.pack(*fields, 0, destination, source)))
    return _HEADER_4.pack(*fields, checksum, destination, source) + error


def _unreachable_6(packet: Bytes) -> bytes | None:
    source, destination = bytes(packet[8:24]), bytes(packet[24:40])
    if not _is_answered(packet, packet[6], 40) or not all(map(_is_host_6, (source, destination))):
        return None
    quoted = bytes(packet[: _LARGEST[6] - _HEADER_6.size - _ERROR.size])
    length = _ERROR.size + len(quoted)
    total = word_sum(destination + source) + length + _ICMPV6 + 0x0103 + word_sum(quoted)
    header = _HEADER_6.pack(6 << 28, length, _ICMPV6, _HOPS, destination, source)
    return header + _ERROR.pack(1, 3, complement(total), 0) + quoted


def _is_answered(packet: Bytes, protocol: int, start: int) -> bool:
    return protocol in (TCP, UDP) or (len(packet) > start and packet[start] == _ECHO.get(protocol))


def _is_host_4(address: bytes) -> bool:
    found = IPv4Address(address)
    return not (found.is_multicast or found.is_unspecified or found.is_reserved)


def _is_host_6(address: bytes) -> bool:
    found = IPv6Address(address)
    return not (found.is_multicast or found.is_unspecified)
