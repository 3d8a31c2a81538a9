"""As much of an inner IP packet as WireGuard must read: version, length, source and destination (RFC 791, RFC 8200)."""

from typing import NamedTuple

from .messages import TRANSPORT_OVERHEAD


class InnerHeader(NamedTuple):
    source: bytes
    """4 or 16 bytes."""
    destination: bytes
    length: int
    """The whole packet's, header included."""


def inner_header(packet: bytes | memoryview) -> InnerHeader | None:
    """Read the header; None if it is not IP, or says it is longer than `packet`. Padding behind the packet is allowed."""
    size = len(packet)
    if size >= 40 and packet[0] >> 4 == 6:
        length = 40 + (packet[4] << 8 | packet[5])
        if length <= size:
            return InnerHeader(bytes(packet[8:24]), bytes(packet[24:40]), length)
    elif size >= 20 and packet[0] >> 4 == 4:
        length = packet[2] << 8 | packet[3]
        if 20 <= length <= size:
            return InnerHeader(bytes(packet[12:16]), bytes(packet[16:20]), length)
    return None


_LARGEST = 65_507 - TRANSPORT_OVERHEAD
"""What one UDP datagram can carry over IPv4, too."""


def padded_length(length: int, mtu: int) -> int:
    """The length to seal: up to the next multiple of 16, but never beyond the MTU, nor beyond what UDP can carry."""
    return max(length, min(-(-length // 16) * 16, mtu, _LARGEST))
