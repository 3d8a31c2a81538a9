"""Netlink's wire format (netlink(7), linux/netlink.h): message headers, attributes and error answers. No I/O.

Every length is checked against the available bytes before anything behind it is read. An impossible length ends
parsing: what came before it is kept, what follows is dropped. No input raises an exception.
"""

import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    *("ACK", "DONE", "DUMP", "DUMP_INTERRUPTED", "ERROR", "KIND_MASK", "REQUEST"),
    *("Message", "attribute", "attributes", "encode", "error_of", "nested", "number", "parse", "text", "values"),
]

ERROR: Final = 2
DONE: Final = 3
REQUEST: Final = 0x1
ACK: Final = 0x4
DUMP: Final = 0x300
DUMP_INTERRUPTED: Final = 0x10
_CAPPED, _ACK_TLVS = 0x100, 0x200
KIND_MASK: Final = 0x3FFF
"""An attribute's kind without the flags for nested attributes and for network byte order."""

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_CODE: Final = struct.Struct("=i")
_NESTED: Final = 0x8000
_KERNEL_TEXT: Final = 1


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its header's fields, and where in `data` its payload begins and ends."""

    kind: int
    flags: int
    sequence: int
    data: bytes
    start: int
    end: int

    def fixed(self, layout: struct.Struct) -> tuple[Any, ...] | None:
        """The structure at the start of the payload; None if the payload is shorter."""
        if self.end - self.start < layout.size:
            return None
        return layout.unpack_from(self.data, self.start)

    def attributes(self, skip: int) -> Iterator[tuple[int, int, int]]:
        """The attributes behind a fixed structure of `skip` bytes, as `attributes` gives them."""
        return attributes(self.data, self.start + skip, self.end)

    def values(self, skip: int) -> dict[int, bytes]:
        """The attributes behind a fixed structure of `skip` bytes, by kind."""
        return values(self.data, self.start + skip, self.end)


def encode(kind: int, payload: bytes, flags: int = REQUEST, sequence: int = 0) -> bytes:
    """One message to the kernel."""
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, sequence, 0) + payload


def parse(data: bytes) -> Iterator[Message]:
    """The messages of one datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield Message(kind, flags, sequence, data, offset + _HEADER.size, offset + length)
        offset += (length + 3) & ~3


def error_of(message: Message) -> tuple[int, str]:
    """The error number of an ERROR or DONE message, 0 for success, and its explanation: the kernel's if it gives one."""
    found = message.fixed(_CODE)
    code = -found[0] if found is not None else 0
    if code <= 0:
        return 0, ""
    explanation = os.strerror(code)
    if message.flags & _ACK_TLVS:
        # the number is followed by the request: only its header if it is capped, else all of it
        request = message.data[message.start + 4 : message.start + 8]
        skip = 4 + (_HEADER.size if message.flags & _CAPPED or len(request) < 4 else number(request))
        for kind, start, end in message.attributes(skip):
            if kind == _KERNEL_TEXT:
                explanation = f"{explanation}: {text(message.data[start:end])}"
    return code, explanation


# --- attributes


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NESTED, b"".join(parts))


def attributes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Kind, start and end of each attribute's value."""
    end = len(data) if end is None else min(end, len(data))
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        if length < 4 or start + length > end:
            return
        yield kind & KIND_MASK, start + 4, start + length
        start += (length + 3) & ~3


def values(data: bytes, start: int = 0, end: int | None = None) -> dict[int, bytes]:
    """The attributes by kind; the last one of a kind counts."""
    return {kind: data[begin:stop] for kind, begin, stop in attributes(data, start, end)}


def number(value: bytes) -> int:
    """An unsigned number in the host's byte order; 0 for an empty value."""
    return int.from_bytes(value, sys.byteorder)


def text(value: bytes) -> str:
    """A string as the kernel writes it, with a zero byte at its end."""
    return value.partition(b"\0")[0].decode(errors="replace")
