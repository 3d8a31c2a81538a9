"""Internet checksums (RFC 1071), of one packet and of all rows of a matrix at once.

Sums are taken modulo 65,535, in which the order of bytes within the 16-bit words only swaps the result, so that words may be
read in the host's order and be as wide as 32 bits. A sum of zero means the one's complement sum 0xFFFF, because no
pseudo-header is all zero.
"""

from functools import lru_cache
from typing import Final

import numpy as np

from siderolink.common.wireguard.packets.buffers import Array, Bytes

MODULUS: Final = 65535
_LARGE: Final = MODULUS << 40
"""A multiple of the modulus above the sum of any row."""


def swap(number: int) -> int:
    """A 16-bit number with its two bytes exchanged."""
    return (number & 255) << 8 | number >> 8


def word_sum(data: Bytes) -> int:
    """The sum of the big-endian words of `data` modulo 65,535; an odd last byte is padded with zero."""
    number = int.from_bytes(data, "big")
    return (number << 8 if len(data) & 1 else number) % MODULUS


def complement(total: int) -> int:
    """The checksum that belongs to a sum of words."""
    return (MODULUS - total % MODULUS) % MODULUS


def pseudo_header_sum(packet: Bytes, version: int, protocol: int) -> int:
    """The sum of both addresses and the protocol, as TCP and UDP include it; the length is left to the caller."""
    return protocol + _address_sum(bytes(packet[8:40] if version == 6 else packet[12:20]))


@lru_cache(maxsize=64)
def _address_sum(pair: bytes) -> int:
    return word_sum(pair)


def row_sums(words: Array) -> Array:
    """The sum of each row of little-endian words; below 2**48 for rows of up to 64 KiB of 32-bit words."""
    sums: Array = np.add.reduce(words, axis=1, dtype=np.int64)
    return sums


def row_complements(sums: Array, constant: int) -> Array:
    """The checksum of each row, in the byte order of its sum, after adding `constant` (at least 0) to each sum.

    It replaces the sums (64 bits each). Every operation here keeps the type, because conversions are expensive.
    """
    np.subtract(_LARGE - constant, sums, out=sums)
    np.remainder(sums, MODULUS, out=sums)
    return sums.view("<u2")[::4]


def complete_checksum(packet: memoryview, start: int, offset: int) -> None:
    """Finish a checksum whose field (`offset` after `start`) holds the pseudo-header's sum. The caller checks the bounds."""
    checksum = complement(word_sum(packet[start:]))
    if not checksum and offset == 6:  # UDP: zero would mean "no checksum" (RFC 768)
        checksum = 0xFFFF
    at = start + offset
    packet[at : at + 2] = checksum.to_bytes(2, "big")
