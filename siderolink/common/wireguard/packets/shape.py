"""The shape of a super-packet from a TUN interface, read and validated from its headers."""

from typing import Final, NamedTuple

from siderolink.common.wireguard.packets.buffers import round_up
from siderolink.common.wireguard.packets.checksum import MODULUS, pseudo_header_sum
from siderolink.common.wireguard.packets.headers import NEEDS_CSUM, TCP, UDP, VNET_HEADER, VNET_SIZE, Gso

MAX_FRAME: Final = VNET_SIZE + 65535 + 40
"""The longest IP packet, which bounds frames too."""
MAX_SEGMENTS: Final = 2048
"""Linux lets no TCP segment go below 48 bytes of payload by default, which makes 1,366."""
MAX_BYTES: Final = 1 << 19
"""All rows of one super-packet; those 1,366 segments with the longest headers take 240 KiB."""


class MalformedFrame(ValueError):
    """Raised when a frame from the interface is inconsistent; it is dropped."""


def packet_size(frame: memoryview) -> int:
    """The bytes of the packet in a frame (virtio_net_hdr and packet). Raises MalformedFrame for no IP packet's length."""
    if not VNET_SIZE + 20 <= len(frame) <= MAX_FRAME:
        raise MalformedFrame(f"a frame of {len(frame)} bytes")
    return len(frame) - VNET_SIZE


class Shape(NamedTuple):
    """The properties that super-packets must share for their segments to be rows of one matrix."""

    version: int
    protocol: int
    transport: int
    """The offset of the TCP or UDP header."""
    header: int
    """The offset of the payload."""
    gso_size: int
    """The payload of each segment but the last."""
    pseudo: int
    """The sum of the pseudo-header without the length."""

    @property
    def size(self) -> int:
        """The bytes of each segment but the last."""
        return self.header + self.gso_size

    def segments(self, size: int) -> int:
        """How many segments a super-packet of `size` bytes has. Raises MalformedFrame."""
        payload = size - self.header
        count = -(-payload // self.gso_size)
        if not 1 <= count <= MAX_SEGMENTS or count * round_up(self.header + self.gso_size) > MAX_BYTES:
            raise MalformedFrame(f"{payload} bytes in segments of {self.gso_size}")
        return count


def parse_shape(frame: memoryview) -> Shape:
    """Read the headers of a frame of at least 30 bytes (virtio_net_hdr and packet). Raises MalformedFrame."""
    flags, gso_type, _, gso_size, csum_start, _ = VNET_HEADER.unpack_from(frame)
    packet = frame[VNET_SIZE:]
    kind = gso_type & ~Gso.ECN
    version = packet[0] >> 4
    if kind == Gso.UDP_L4 and gso_type == kind and version in (4, 6):
        protocol = UDP
    elif (kind == Gso.TCPV4 and version == 4) or (kind == Gso.TCPV6 and version == 6):
        protocol = TCP
    else:
        raise MalformedFrame(f"GSO type {gso_type:#x} for IP version {version}")
    start = csum_start if flags & NEEDS_CSUM else None
    transport, pseudo = _find_transport(packet, version, protocol, start)
    if len(packet) < transport + (20 if protocol == TCP else 8):
        raise MalformedFrame("the transport header is cut off")
    header = transport + ((packet[transport + 12] >> 4) * 4 if protocol == TCP else 8)
    if header < transport + (20 if protocol == TCP else 8) or header >= len(packet):
        raise MalformedFrame("the transport header does not fit the packet")
    if start not in (None, transport):
        raise MalformedFrame("the checksum does not start at the transport header")
    if not 1 <= gso_size <= 65535 - header:
        raise MalformedFrame(f"segments of {gso_size} bytes")
    return Shape(version, protocol, transport, header, gso_size, pseudo)


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
    # Behind extension headers, csum_start says where, and the partial checksum holds the pseudo-header's sum.
    field = 16 if protocol == TCP else 6
    if csum_start is None or csum_start < 48 or csum_start % 4 or csum_start + field + 2 > len(packet):
        raise MalformedFrame("IPv6 extension headers without a place for the checksum")
    partial = int.from_bytes(packet[csum_start + field : csum_start + field + 2], "big")
    return csum_start, (partial - (len(packet) - csum_start)) % MODULUS
