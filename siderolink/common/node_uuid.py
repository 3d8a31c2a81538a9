"""The UUID of a machine: its canonical form, and placeholder values in firmware."""

import re
import uuid

from siderolink.common.errors import ConfigurationError

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

_VENDORS = (
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "00020003-0004-0005-0006-000700080009",
    "03000200-0400-0500-0006-000700080009",
    "12345678-1234-5678-90ab-cddeefaabbcc",
    "fefefefe-fefe-fefe-fefe-fefefefefefe",
)


def _orders(text: str) -> set[str]:
    """A UUID in every byte order in use: unchanged, with SMBIOS's first three fields swapped, reversed, or swapped in pairs."""
    value = uuid.UUID(text)
    swapped = value.bytes[3::-1] + value.bytes[5:3:-1] + value.bytes[7:5:-1] + value.bytes[8:]
    pairs = b"".join(value.bytes[at : at + 2][::-1] for at in range(0, 16, 2))
    return {str(uuid.UUID(bytes=one)) for one in (value.bytes, swapped, value.bytes[::-1], pairs)}


PLACEHOLDERS: frozenset[str] = frozenset(form for text in _VENDORS for form in _orders(text))
"""Vendors' placeholders, shared by many machines, in either byte order."""


def parse_uuid(text: str) -> str:
    """The UUID in canonical form, in lower case. Raises ConfigurationError, whose message does not contain the text."""
    if len(text) != 36 or _UUID.fullmatch(text.lower()) is None:
        raise ConfigurationError("a UUID must have the form 8-4-4-4-12 hexadecimal digits")
    return text.lower()


def is_placeholder(node_uuid: str) -> bool:
    """Whether a parsed UUID is a vendor's placeholder."""
    return node_uuid in PLACEHOLDERS
