"""Netlink's attributes: a length of two bytes, a kind of two, a value, padded to four (linux/netlink.h). No I/O."""

import struct
from collections.abc import Iterator
from typing import Final

__all__ = ["KIND_MASK", "attribute", "attributes", "nested"]

_HEAD: Final = struct.Struct("=HH")
_NESTED: Final = 0x8000
KIND_MASK: Final = 0x3FFF
"""Without the flags for nested attributes and for network byte order."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _HEAD.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NESTED, b"".join(parts))


def attributes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Kind, start and end of each attribute's value. A length that cannot be ends the walk."""
    end = len(data) if end is None else end
    while start + 4 <= end:
        length, kind = _HEAD.unpack_from(data, start)
        if length < 4 or start + length > end:
            return
        yield kind & KIND_MASK, start + 4, start + length
        start += (length + 3) & ~3
