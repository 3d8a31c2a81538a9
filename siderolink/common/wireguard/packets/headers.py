"""IP, TCP, UDP and virtio headers, as far as the data plane needs them (RFC 791, 8200, 9293, 768; virtio 5.1.6)."""

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from siderolink.common.wireguard.packets.buffers import Bytes

TCP: Final = 6
UDP: Final = 17
FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20
CWR: Final = 0x80

VNET_HEADER: Final = struct.Struct("=BBHHHH")
"""virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, in the host's byte order."""
VNET_SIZE: Final = VNET_HEADER.size
NEEDS_CSUM: Final = 1
PLAIN_VNET_HEADER: Final = bytes(VNET_SIZE)


class Gso(IntEnum):
    """The values of gso_type."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 4
    UDP_L4 = 5
    ECN = 0x80
    """A flag beside the TCP types: the first segment may carry CWR."""


class Inner(NamedTuple):
    """Offsets within one IP packet that carries TCP or UDP."""

    version: int
    protocol: int
    transport: int
    """The offset of the TCP or UDP header."""
    header: int
    """The offset of the payload."""
    total: int
    """The packet's length according to its IP header."""


def address_pair(packet: Bytes, offset: int = 0) -> bytes | None:
    """Source and destination combined of the packet that begins at `offset`; None if it is too short or not IP."""
    size = len(packet) - offset
    if size < 20:
        return None
    version = packet[offset] >> 4
    if version == 6 and size >= 40:
        return bytes(packet[offset + 8 : offset + 40])
    if version == 4:
        return bytes(packet[offset + 12 : offset + 20])
    return None


def parse_inner(packet: Bytes, total: int) -> Inner | None:
    """Find the TCP or UDP header of an IP packet of `total` bytes, whose IP header inner_header() has accepted.

    None for fragments, for IPv6 extension headers, for other protocols and for headers that do not fit.
    """
    if packet[0] >> 4 == 6:
        version, protocol, transport = 6, packet[6], 40
    else:
        version, protocol, transport = 4, packet[9], (packet[0] & 15) * 4
        if packet[6] & 0x3F or packet[7]:  # MF or an offset
            return None
    if protocol == TCP:
        if total < transport + 20:
            return None
        header = transport + (packet[transport + 12] >> 4) * 4
        if not transport + 20 <= header <= total:
            return None
    elif protocol == UDP:
        header = transport + 8
        if total < header or (packet[transport + 4] << 8 | packet[transport + 5]) != total - transport:
            return None
    else:
        return None
    return Inner(version, protocol, transport, header, total)
