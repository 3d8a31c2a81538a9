"""What a super-packet from a TUN interface looks like, read from its headers, which nobody is trusted with."""

from typing import Final, NamedTuple

from siderolink.common.wireguard.packets.buffers import round_up
from siderolink.common.wireguard.packets.checksum import MODULUS, pseudo_header_sum
from siderolink.common.wireguard.packets.headers import TCP, UDP, VNET_SIZE, Gso

MAX_FRAME: Final = VNET_SIZE + 65535 + 40
"""No IP packet is longer, so no frame is."""
MAX_SEGMENTS: Final = 2048
"""Linux lets no TCP segment go below 48 bytes of payload by default, which makes 1,366."""
MAX_BYTES: Final = 1 << 19
"""All rows of one super-packet; those 1,366 segments with the longest headers take 240 KiB."""


class MalformedFrame(ValueError):
    """Raised when a frame from the interface contradicts itself; it was not for us to repair."""


class Shape(NamedTuple):
    """What one super-packet looks like, but for its length."""

    version: int
    protocol: int
    transport: int
    header: int
    gso_size: int
    segments: int


def parse_shape(packet: memoryview, gso_type: int, gso_size: int, csum_start: int | None) -> tuple[Shape, int]:
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
    return Shape(version, protocol, transport, header, gso_size, count), pseudo


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
