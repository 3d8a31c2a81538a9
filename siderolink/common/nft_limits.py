"""Named limits of nftables in maps by IPv6 address, with a counter beside each: messages that change them, and a match.

A limit is a token bucket of the kernel: it holds what passes in a second, and `burst` bytes more. One that exists cannot be
changed, so another rate is another limit, to which the address goes in the same transaction.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_INET
from pyroute2.nftables.expressions import genex

from siderolink.common.netlink import RequestSocket
from siderolink.common.netlink.messages import attribute, encode, nested, text, values
from siderolink.common.nft_matches import Match, ipv6_address

__all__ = [
    *("LEAST_BUCKET", "MOST_BYTES", "add", "make_counter", "make_limit", "make_map", "over_limit", "over_mapped_limit"),
    *("read_named_counters", "remove", "remove_object"),
]

LEAST_BUCKET: Final = 128 * 1024
"""Bytes; two super-packets pass at any rate."""
MOST_BYTES: Final = 10**10
"""Of a second; the kernel's arithmetic ends soon above."""

_NEW_SET, _NEW_ELEMENTS, _DELETE_ELEMENTS, _NEW_OBJECT, _GET_OBJECT, _DELETE_OBJECT = 9, 12, 14, 18, 19, 20
_SUBSYSTEM: Final = 10 << 8
_REQUEST, _CREATE, _EXCLUSIVE = 0x1, 0x400, 0x200
_COUNTER, _LIMIT = 1, 4
_OF_OBJECTS = 0x40  # NFT_SET_OBJECT
_IPV6_TYPE = 8  # how `nft` shows the key
_BYTES, _OVER = 1, 1
_HEADER: Final = bytes([NFPROTO_INET, 0, 0, 0])
_REGISTER = 1

Kind = Literal["limit", "counter"]
_KINDS: dict[Kind, int] = {"counter": _COUNTER, "limit": _LIMIT}


def _be32(value: int) -> bytes:
    return struct.pack("!I", value)


def _name(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _message(kind: int, *attributes: bytes, flags: int = 0) -> bytes:
    return encode(_SUBSYSTEM | kind, _HEADER + b"".join(attributes), _REQUEST | flags)


def make_map(table: str, name: str, kind: Kind, number: int) -> bytes:
    """A map from IPv6 addresses to limits or counters; `number` tells the sets of a transaction apart."""
    fields = [
        _name(1, table),
        _name(2, name),
        attribute(3, _be32(_OF_OBJECTS)),
        attribute(4, _be32(_IPV6_TYPE)),
        attribute(5, _be32(16)),
        attribute(10, _be32(number)),
        attribute(15, _be32(_KINDS[kind])),
    ]
    return _message(_NEW_SET, *fields, flags=_CREATE | _EXCLUSIVE)


def _make(table: str, name: str, kind: Kind, *data: bytes) -> bytes:
    fields = [_name(1, table), _name(2, name), attribute(3, _be32(_KINDS[kind])), nested(4, *data)]
    return _message(_NEW_OBJECT, *fields, flags=_CREATE | _EXCLUSIVE)


def make_limit(table: str, name: str, per_second: int) -> bytes:
    """A limit in bytes a second. Packets match it that are beyond."""
    data = [
        attribute(1, struct.pack("!Q", min(per_second, MOST_BYTES))),
        attribute(2, struct.pack("!Q", 1)),
        attribute(3, _be32(max(0, LEAST_BUCKET - per_second))),
        attribute(4, _be32(_BYTES)),
        attribute(5, _be32(_OVER)),
    ]
    return _make(table, name, "limit", *data)


def make_counter(table: str, name: str) -> bytes:
    return _make(table, name, "counter")


def remove_object(table: str, name: str, kind: Kind) -> bytes:
    """Remove a limit or counter to which no map leads any more."""
    return _message(_DELETE_OBJECT, _name(1, table), _name(2, name), attribute(3, _be32(_KINDS[kind])))


def add(table: str, name: str, address: bytes, target: str) -> bytes:
    """Let the map lead from an address to a limit or counter."""
    element = nested(1, nested(1, attribute(1, address)), _name(9, target))
    return _message(_NEW_ELEMENTS, _name(1, table), _name(2, name), nested(3, element), flags=_CREATE | _EXCLUSIVE)


def remove(table: str, name: str, address: bytes) -> bytes:
    return _message(_DELETE_ELEMENTS, _name(1, table), _name(2, name), nested(3, nested(1, nested(1, attribute(1, address)))))


# --- in rules


def over_mapped_limit(limits: str, counters: str, side: Literal["source", "destination"]) -> Match:
    """IPv6 packets beyond the limit that the map has for their address; each is counted by that address's counter.

    An address without a limit has none to be beyond.
    """
    return [*ipv6_address(side), _mapped(limits), *ipv6_address(side), _mapped(counters)]


def over_limit(name: str) -> Match:
    """Packets beyond a named limit."""
    return [genex("objref", {"imm_type": _LIMIT, "imm_name": name})]


def _mapped(name: str) -> Any:
    return genex("objref", {"set_sreg": _REGISTER, "set_name": name})


# --- what was counted


def read_named_counters(requests: RequestSocket, table: str) -> Iterator[dict[str, int]]:
    """Packets by counter's name, in parts of a read each. Raises NetlinkRefusal."""
    for part in requests.dump(_SUBSYSTEM | _GET_OBJECT, _HEADER + _name(1, table) + attribute(3, _be32(_COUNTER))):
        found = (message.values(len(_HEADER)) for message in part.messages)
        yield dict(_counted(found))


def _counted(found: Iterable[dict[int, bytes]]) -> Iterator[tuple[str, int]]:
    for fields in found:
        yield text(fields.get(2, b"")), int.from_bytes(values(fields.get(4, b"")).get(2, b""), "big")
