"""Named nftables limits in maps by IPv6 address, each with a counter: messages that change them, and a match.

A limit is a token bucket in the kernel with the size of one second plus `burst` bytes. An existing limit cannot be changed, so
a new rate is a new limit, to which the address is moved in the same transaction.
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
"""Bytes; lets two super-packets pass at any rate."""
MOST_BYTES: Final = 10**10
"""Maximum per second; the kernel's arithmetic overflows soon above."""

_NEW_SET, _NEW_ELEMENTS, _DELETE_ELEMENTS, _NEW_OBJECT, _GET_OBJECT, _DELETE_OBJECT = 9, 12, 14, 18, 19, 20
_SUBSYSTEM: Final = 10 << 8
_REQUEST, _CREATE, _EXCLUSIVE = 0x1, 0x400, 0x200
_COUNTER, _LIMIT = 1, 4
_OF_OBJECTS = 0x40  # NFT_SET_OBJECT
_IPV6_TYPE = 8  # the key's format in `nft` output
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
    """A map from IPv6 addresses to limits or counters; `number` identifies the set within a transaction."""
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
    """A limit in bytes per second. It matches packets beyond the rate."""
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
    """Remove a limit or counter that no map refers to."""
    return _message(_DELETE_OBJECT, _name(1, table), _name(2, name), attribute(3, _be32(_KINDS[kind])))


def add(table: str, name: str, address: bytes, target: str) -> bytes:
    """Map an address to a limit or counter."""
    element = nested(1, nested(1, attribute(1, address)), _name(9, target))
    return _message(_NEW_ELEMENTS, _name(1, table), _name(2, name), nested(3, element), flags=_CREATE | _EXCLUSIVE)


def remove(table: str, name: str, address: bytes) -> bytes:
    return _message(_DELETE_ELEMENTS, _name(1, table), _name(2, name), nested(3, nested(1, nested(1, attribute(1, address)))))


# --- use in rules


def over_mapped_limit(limits: str, counters: str, side: Literal["source", "destination"]) -> Match:
    """IPv6 packets beyond the limit mapped to their address; each is counted by that address's counter.

    Packets of addresses without a limit never match.
    """
    return [*ipv6_address(side), _mapped(limits), *ipv6_address(side), _mapped(counters)]


def over_limit(name: str) -> Match:
    """Packets beyond a named limit."""
    return [genex("objref", {"imm_type": _LIMIT, "imm_name": name})]


def _mapped(name: str) -> Any:
    return genex("objref", {"set_sreg": _REGISTER, "set_name": name})


# --- reading counters


def read_named_counters(requests: RequestSocket, table: str) -> Iterator[dict[str, int]]:
    """Packets by counter name, one part per read. Raises NetlinkRefusal."""
    for part in requests.dump(_SUBSYSTEM | _GET_OBJECT, _HEADER + _name(1, table) + attribute(3, _be32(_COUNTER))):
        found = (message.values(len(_HEADER)) for message in part.messages)
        yield dict(_counted(found))


def _counted(found: Iterable[dict[int, bytes]]) -> Iterator[tuple[str, int]]:
    for fields in found:
        yield text(fields.get(2, b"")), int.from_bytes(values(fields.get(4, b"")).get(2, b""), "big")
