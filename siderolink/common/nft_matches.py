"""Matches of firewall rules, as nftables expressions. A rule acts on packets that satisfy all of its matches."""

import struct
import sys
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal, TypeAlias, get_args

from pyroute2.netlink.nfnetlink.nftsocket import NFPROTO_IPV4, NFPROTO_IPV6, Cmp, Meta, Regs
from pyroute2.nftables.expressions import genex

Match: TypeAlias = list[Any]
"""Expressions; a packet that does not match them leaves the rule."""
ConnectionState = Literal["invalid", "established", "related", "new"]
"""In the order of the kernel's bits."""

_REGISTER = int(Regs.NFT_REG_1)
_IFNAMSIZ = 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
_CT_STATE = 0
_CT_DIRECTION = 1
_LOCAL_ADDRESS = 2  # RTN_LOCAL
_PER_SECOND = 1


def protocol(number: int) -> Match:
    """Packets of one transport protocol, such as ``socket.IPPROTO_UDP``, over IPv4 and IPv6."""
    return [_meta(Meta.NFT_META_L4PROTO), _compare(Cmp.NFT_CMP_EQ, struct.pack("B", number))]


def arriving_by(interface: str | int) -> Match:
    """Packets received on an interface: one of a name, or the one of an index, which it keeps when it is renamed."""
    key = Meta.NFT_META_IIFNAME if isinstance(interface, str) else Meta.NFT_META_IIF
    return [_meta(key), _compare(Cmp.NFT_CMP_EQ, _interface(interface))]


def leaving_by(interface: str | int) -> Match:
    """Packets leaving by an interface; see `arriving_by`."""
    key = Meta.NFT_META_OIFNAME if isinstance(interface, str) else Meta.NFT_META_OIF
    return [_meta(key), _compare(Cmp.NFT_CMP_EQ, _interface(interface))]


def port(first: int, last: int) -> Match:
    """TCP or UDP packets to these ports; must follow `protocol`."""
    load = _payload(_TRANSPORT_HEADER, 2, 2)
    if first == last:
        return [load, _compare(Cmp.NFT_CMP_EQ, struct.pack("!H", first))]
    return [
        load,
        _compare(Cmp.NFT_CMP_GTE, struct.pack("!H", first)),
        _compare(Cmp.NFT_CMP_LTE, struct.pack("!H", last)),
    ]


def icmp_type(number: int) -> Match:
    """ICMP or ICMPv6 messages of one type; must follow `protocol`."""
    return [_payload(_TRANSPORT_HEADER, 0, 1), _compare(Cmp.NFT_CMP_EQ, struct.pack("B", number))]


def from_network(network: IPv4Network | IPv6Network) -> Match:
    """Packets with a source in a network."""
    return _address(network, offset=12 if network.version == 4 else 8)


def to_network(network: IPv4Network | IPv6Network) -> Match:
    """Packets with a destination in a network."""
    return _address(network, offset=16 if network.version == 4 else 24)


def ipv6_address(side: Literal["source", "destination"]) -> Match:
    """IPv6 packets; loads that address into the register."""
    is_ipv6 = [_meta(Meta.NFT_META_NFPROTO), _compare(Cmp.NFT_CMP_EQ, struct.pack("B", NFPROTO_IPV6))]
    return [*is_ipv6, _payload(_NETWORK_HEADER, 8 if side == "source" else 24, 16)]


def connection_in(*states: ConnectionState) -> Match:
    """Packets whose connection, by the kernel's connection tracking, is in one of these states."""
    bits = sum(2 ** get_args(ConnectionState).index(state) for state in states)
    load = genex("ct", {"key": _CT_STATE, "dreg": _REGISTER})
    return [load, _mask(bits.to_bytes(4, sys.byteorder)), _compare(Cmp.NFT_CMP_NEQ, bytes(4))]


def in_reply_direction() -> Match:
    """Packets of a connection in the direction opposite to its first packet."""
    return [genex("ct", {"key": _CT_DIRECTION, "dreg": _REGISTER}), _compare(Cmp.NFT_CMP_EQ, b"\x01")]


def not_to_this_host() -> Match:
    """Packets whose destination is not an address of this host."""
    # pyroute2 combines these two values to 3, the type of the address.
    result = {"NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF"}
    destination = 2  # NFTA_FIB_F_DADDR
    load = genex("fib", {"dreg": _REGISTER, "result": result, "flags": destination})
    return [load, _compare(Cmp.NFT_CMP_NEQ, _LOCAL_ADDRESS.to_bytes(4, sys.byteorder))]


def at_most(per_second: int) -> Match:
    """Rate limit in packets per second, with a burst of the same size; excess packets do not match."""
    return [genex("limit", {"rate": per_second, "unit": _PER_SECOND, "burst": per_second, "type": 0, "flags": 0})]


def counted() -> Match:
    """Every packet, counted."""
    return [genex("counter", {})]


def _interface(interface: str | int) -> bytes:
    if isinstance(interface, int):
        return interface.to_bytes(4, sys.byteorder)
    return interface.encode().ljust(_IFNAMSIZ, b"\0")


def _address(network: IPv4Network | IPv6Network, offset: int) -> Match:
    family = NFPROTO_IPV4 if network.version == 4 else NFPROTO_IPV6
    matches = [_meta(Meta.NFT_META_NFPROTO), _compare(Cmp.NFT_CMP_EQ, struct.pack("B", family))]
    if network.prefixlen == 0:
        return matches
    matches.append(_payload(_NETWORK_HEADER, offset, network.max_prefixlen // 8))
    if network.prefixlen < network.max_prefixlen:
        matches.append(_mask(network.netmask.packed))
    return [*matches, _compare(Cmp.NFT_CMP_EQ, network.network_address.packed)]


def _meta(key: Meta) -> Any:
    return genex("meta", {"key": int(key), "dreg": _REGISTER})


def _payload(base: int, offset: int, length: int) -> Any:
    return genex("payload", {"dreg": _REGISTER, "base": base, "offset": offset, "len": length})


def _mask(mask: bytes) -> Any:
    xor = {"attrs": [("NFTA_DATA_VALUE", bytes(len(mask)))]}
    attributes = {"sreg": _REGISTER, "dreg": _REGISTER, "len": len(mask), "mask": {"attrs": [("NFTA_DATA_VALUE", mask)]}}
    return genex("bitwise", {**attributes, "xor": xor})


def _compare(operation: Cmp, value: bytes) -> Any:
    return genex("cmp", {"sreg": _REGISTER, "op": int(operation), "data": {"attrs": [("NFTA_DATA_VALUE", value)]}})
