"""Header blocks of requests: HPACK (RFC 7541) read in one pass, and the rules of HTTP/2's fields (RFC 9113, 8.2 and 8.3).

Most calls come on a connection of their own, so the reading of one header block is a good part of what a call costs. This does
what hpack's decoder and h2's validation do, and tests hold them beside each other.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from hpack import (
    Decoder,
    HeaderTuple,
    HPACKDecodingError,
    InvalidTableSizeError,
    NeverIndexedHeaderTuple,
    OversizedHeaderListError,
)
from hpack.huffman_table import decode_huffman

from siderolink.common.grpc.refusals import Refusal, Refused

_MAX_INTEGER_BYTES = 5
_ENTRY_OVERHEAD = 32
_CACHED_BYTES = 64

_NAME = re.compile(r":?[!-9;-@\[-~]+")
_VALUE = re.compile(r"(?:[^\0\r\n\t ](?:[^\0\r\n]*[^\0\r\n\t ])?)?")
_PSEUDO = frozenset((":method", ":scheme", ":path", ":authority"))
_CONNECTION_FIELDS = frozenset(("connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"))


class FieldDecoder(Decoder):
    """hpack's decoder, reading in one pass; short Huffman strings are remembered, as all machines say nearly the same."""

    def decode(self, data: bytes, raw: bool = False) -> list[HeaderTuple]:
        """The fields of one block as bytes, whatever `raw` says. Raises HPACKError or IndexError for what cannot be read."""
        headers: list[HeaderTuple] = []
        pos, end, size = 0, len(data), 0
        while pos < end:
            first = data[pos]
            if first & 0xE0 == 0x20:
                if headers:
                    raise HPACKDecodingError("a table size update behind a field")
                pos = self._resize(data, pos)
                continue
            field, pos = self._field(data, pos, first)
            headers.append(field)
            size += _ENTRY_OVERHEAD + len(field[0]) + len(field[1])
            if size > self.max_header_list_size:
                raise OversizedHeaderListError(f"a header list of more than {self.max_header_list_size} bytes")
        if self.header_table.maxsize > self.max_allowed_table_size:
            raise InvalidTableSizeError("the table is larger than it may be")
        return headers

    def _field(self, data: bytes, pos: int, first: int) -> tuple[HeaderTuple, int]:
        table = self.header_table
        if first & 0x80:
            index, pos = _integer(data, pos, 0x7F)
            return HeaderTuple(*table.get_by_index(index)), pos
        index, pos = _integer(data, pos, 0x3F if first & 0x40 else 0x0F)
        if index:
            name = table.get_by_index(index)[0]
        else:
            name, pos = _string(data, pos)
        value, pos = _string(data, pos)
        if first & 0x40:
            table.add(name, value)
        return NeverIndexedHeaderTuple(name, value) if first & 0xF0 == 0x10 else HeaderTuple(name, value), pos

    def _resize(self, data: bytes, pos: int) -> int:
        size, pos = _integer(data, pos, 0x1F)
        if size > self.max_allowed_table_size:
            raise InvalidTableSizeError("a table size update beyond the largest allowed")
        self.header_table.maxsize = size
        return pos


def check_fields(headers: Sequence[tuple[str, str]]) -> None:
    """Check a request's fields. Raises Refused for what RFC 9113 calls malformed."""
    pseudo: dict[str, str] = {}
    host = None
    for number, (name, value) in enumerate(headers):
        if _NAME.fullmatch(name) is None or _VALUE.fullmatch(value) is None:
            raise _malformed("a field has a character that it may not have")
        if name[0] == ":":
            if name not in _PSEUDO or name in pseudo or number != len(pseudo):
                raise _malformed("a pseudo-header field is unknown, repeated or out of place")
            pseudo[name] = value
        elif name in _CONNECTION_FIELDS or (name == "te" and value.lower() != "trailers"):
            raise _malformed("a field of HTTP/1 connections")
        elif name == "host":
            if host is not None:
                raise _malformed("the request names its host twice")
            host = value
    authority = pseudo.get(":authority", host)
    if len(pseudo) - (":authority" in pseudo) != 3 or not pseudo[":path"] or authority is None or host not in (None, authority):
        raise _malformed("a pseudo-header field is missing, or the request names two hosts")


def _malformed(message: str) -> Refused:
    return Refused(Refusal.PROTOCOL_ERROR, message)


def _integer(data: bytes, pos: int, mask: int) -> tuple[int, int]:
    """An integer whose prefix is the byte at `pos` under `mask` (RFC 7541, 5.1), and where it ends."""
    value = data[pos] & mask
    pos += 1
    if value < mask:
        return value, pos
    for shift in range(0, 7 * _MAX_INTEGER_BYTES, 7):
        byte = data[pos]
        pos += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
    raise HPACKDecodingError("an integer that is too long")


def _string(data: bytes, pos: int) -> tuple[bytes, int]:
    """A string literal (RFC 7541, 5.2), and where it ends."""
    is_huffman = data[pos] & 0x80
    length, pos = _integer(data, pos, 0x7F)
    end = pos + length
    if end > len(data):
        raise HPACKDecodingError("a string that is cut short")
    text = data[pos:end]
    if is_huffman:
        text = _short_huffman(text) if length <= _CACHED_BYTES else decode_huffman(text)
    return text, end


@lru_cache(maxsize=2048)
def _short_huffman(text: bytes) -> bytes:
    return decode_huffman(text)
