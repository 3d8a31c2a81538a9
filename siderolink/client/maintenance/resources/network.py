"""Specs of links, addresses and routes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_interface, ip_network
from typing import Final

from siderolink.client.maintenance.resources.link_kinds import TABLES, kind_fields
from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.netlink import KindFacts
from siderolink.common.pb.common import NetIp, NetIpPrefix
from siderolink.common.pb.talos.resource.definitions.network import (
    AddressStatusSpec,
    LinkStatusSpec,
    NodeAddressSpec,
    RouteStatusSpec,
)

_STATES = ("unknown", "notPresent", "down", "lowerLayerDown", "testing", "dormant", "up")
_LINK_TYPES = {
    1: "ether",
    32: "infiniband",
    280: "can",
    512: "ppp",
    768: "ipip",
    769: "tunnel6",
    772: "loopback",
    776: "sit",
    778: "ipgre",
    823: "ip6gre",
    824: "netlink",
    65534: "nohdr",
    65535: "void",
}
_FAMILIES = {2: "inet4", 10: "inet6"}
# by bit, the lowest first
_LINK_FLAGS = (
    *(
        "UP",
        "BROADCAST",
        "DEBUG",
        "LOOPBACK",
        "POINTTOPOINT",
        "NOTRAILERS",
        "RUNNING",
        "NOARP",
        "PROMISC",
        "ALLMULTI",
        "MASTER",
    ),
    *("SLAVE", "MULTICAST", "PORTSEL", "AUTOMEDIA", "DYNAMIC", "LOWER_UP", "DORMANT", "ECHO"),
)
_ADDRESS_FLAGS = (
    *("temporary", "nodad", "optimistic", "dadfailed", "homeaddress", "deprecated", "tentative", "permanent", "mngmtmpaddr"),
    *("noprefixroute", "mcautojoin", "stableprivacy"),
)
_ROUTE_FLAGS = {8: "notify", 9: "cloned", 10: "equalize", 11: "prefix", 12: "lookup_table", 13: "fib_match", 14: "offload"}
_SCOPES = {0: "global", 200: "site", 253: "link", 254: "host", 255: "nowhere"}
_ROUTE_TYPES = (
    *(
        "unspec",
        "unicast",
        "local",
        "broadcast",
        "anycast",
        "multicast",
        "blackhole",
        "unreachable",
        "prohibit",
        "throw",
        "nat",
    ),
    "xresolve",
)
_PROTOCOLS = {
    0: "unspec",
    1: "redirect",
    2: "kernel",
    3: "boot",
    4: "static",
    9: "ra",
    16: "dhcp",
    42: "babel",
    186: "bgp",
    188: "ospf",
    189: "rip",
}
OTHER_PORT, UNKNOWN_DUPLEX = 255, 255
_PORT_NAMES = {0: "TwistedPair", 1: "AUI", 2: "MII", 3: "Fibre", 4: "BNC", 5: "DirectAttach", 0xEF: "None"}
_DUPLEX_NAMES = {0: "Half", 1: "Full"}
MAIN_TABLE: Final = 254
_LINK_SCOPE: Final = 253
_MAX_CACHED: Final = 4096
"""Specs cached per kind, because most stay the same when a host changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    """An interface as the kernel describes it."""

    index: int
    type: int
    flags: int
    mtu: int
    state: int
    kind: str = ""
    slave_kind: str = ""
    alias: str = ""
    alt_names: tuple[str, ...] = ()
    queue: str = ""
    master: int = 0
    parent: int = 0
    hardware: bytes = b""
    permanent: bytes = b""
    broadcast: bytes = b""
    carrier: bool = False
    bus_path: str = ""
    pci_id: str = ""
    driver: str = ""
    speed: int = 0
    """Mbit/s, 0 if unknown."""
    duplex: int = UNKNOWN_DUPLEX
    port: int = OTHER_PORT
    of_kind: KindFacts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressFacts:
    """An address of an interface as the kernel describes it."""

    address: str
    """With its prefix length."""
    link_index: int
    link: str
    family: int
    scope: int
    flags: int
    local: str = ""
    broadcast: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteFacts:
    """A route as the kernel describes it."""

    family: int
    destination: str
    """With its prefix length; empty for the default route."""
    gateway: str
    source: str
    link_index: int
    link: str
    table: int
    priority: int
    scope: int
    type: int
    flags: int
    protocol: int
    mtu: int = 0

    @property
    def id(self) -> str:
        """The id as existing machines form it."""
        table = "" if self.table == MAIN_TABLE else f"{_name(TABLES, self.table)}/"
        link = f"{self.link}/" if self.family == 10 else ""
        family = _name(_FAMILIES, self.family)
        return f"{table}{link}{family}/{self.gateway}/{self.destination}/{self.priority}"


@lru_cache(_MAX_CACHED)
def link_status(link: LinkFacts) -> ResourceSpec:
    of_kind, shown_of_kind = kind_fields(link.of_kind)
    message = LinkStatusSpec(
        **of_kind,
        index=link.index,
        type=link.type,
        link_index=link.parent,
        flags=link.flags,
        hardware_addr=link.hardware,
        broadcast_addr=link.broadcast,
        mtu=link.mtu,
        queue_disc=link.queue,
        master_index=link.master,
        operational_state=link.state,
        kind=link.kind,
        slave_kind=link.slave_kind,
        bus_path=link.bus_path,
        pciid=link.pci_id,
        driver=link.driver,
        link_state=link.carrier,
        speed_megabits=link.speed,
        port=link.port,
        duplex=link.duplex,
        permanent_addr=link.permanent,
        alias=link.alias,
        alt_names=list(link.alt_names),
    )
    where_known: dict[str, object] = {
        "permanentAddr": link.permanent.hex(":"),
        "masterIndex": link.master,
        "busPath": link.bus_path,
        "pciID": link.pci_id,
        "driver": link.driver,
        "speedMbit": link.speed,
    }
    fields: dict[str, object] = {
        **({"alias": link.alias} if link.alias else {}),
        **({"altNames": list(link.alt_names)} if link.alt_names else {}),
        "index": link.index,
        "type": _name(_LINK_TYPES, link.type),
        "linkIndex": link.parent,
        "flags": _flag_names(link.flags, _LINK_FLAGS),
        "hardwareAddr": link.hardware.hex(":"),
        "broadcastAddr": link.broadcast.hex(":"),
        "mtu": link.mtu,
        "queueDisc": link.queue,
        "operationalState": _STATES[link.state] if link.state < len(_STATES) else str(link.state),
        "kind": link.kind,
        "slaveKind": link.slave_kind,
        "linkState": link.carrier,
        "port": _PORT_NAMES.get(link.port, "Other"),
        "duplex": _DUPLEX_NAMES.get(link.duplex, "Unknown"),
        **{name: value for name, value in where_known.items() if value},
        **shown_of_kind,
    }
    return ResourceSpec(bytes(message), fields)


@lru_cache(_MAX_CACHED)
def address_status(found: AddressFacts) -> ResourceSpec:
    message = AddressStatusSpec(
        address=_prefix(found.address),
        local=_net_ip(found.local),
        broadcast=_net_ip(found.broadcast),
        link_index=found.link_index,
        link_name=found.link,
        family=found.family,
        scope=found.scope,
        flags=found.flags,
    )
    fields: dict[str, object] = {
        "address": found.address,
        **({"local": found.local} if found.local else {}),
        **({"broadcast": found.broadcast} if found.broadcast else {}),
        "linkIndex": found.link_index,
        "linkName": found.link,
        "family": _name(_FAMILIES, found.family),
        "scope": _name(_SCOPES, found.scope),
        "flags": _flag_names(found.flags, _ADDRESS_FLAGS),
    }
    return ResourceSpec(bytes(message), fields)


@lru_cache(_MAX_CACHED)
def route_status(route: RouteFacts) -> ResourceSpec:
    message = RouteStatusSpec(
        family=route.family,
        destination=_prefix(route.destination) if route.destination else None,
        source=_net_ip(route.source),
        gateway=_net_ip(route.gateway),
        out_link_index=route.link_index,
        out_link_name=route.link,
        table=route.table,
        priority=route.priority,
        scope=route.scope,
        type=route.type,
        flags=route.flags,
        protocol=route.protocol,
        mtu=route.mtu,
    )
    fields: dict[str, object] = {
        "family": _name(_FAMILIES, route.family),
        "dst": route.destination,
        "src": route.source,
        "gateway": route.gateway,
        "outLinkIndex": route.link_index,
        "outLinkName": route.link,
        "table": _name(TABLES, route.table),
        "priority": route.priority,
        "scope": _name(_SCOPES, route.scope),
        "type": _ROUTE_TYPES[route.type] if route.type < len(_ROUTE_TYPES) else str(route.type),
        "flags": ",".join(name for bit, name in _ROUTE_FLAGS.items() if route.flags >> bit & 1),
        "protocol": _name(_PROTOCOLS, route.protocol),
        **({"mtu": route.mtu} if route.mtu else {}),
    }
    return ResourceSpec(bytes(message), fields)


def node_addresses(addresses: Iterable[AddressFacts], links: dict[str, LinkFacts]) -> dict[str, ResourceSpec]:
    """Addresses at which others can reach the machine: neither loopback nor link-local."""
    loopbacks = {link.index for link in links.values() if link.flags & 0x8}
    usable = [
        found.address
        for found in sorted(addresses, key=lambda one: (one.family, one.link_index))
        if found.scope < _LINK_SCOPE and found.link_index not in loopbacks and not _is_unusable(found)
    ]
    current = _node_address(usable)
    default = {"default": _node_address(usable[:1])} if usable else {}
    return {"current": current, "routed": current, "accumulative": current, **default}


def _is_unusable(found: AddressFacts) -> bool:
    return bool(found.flags & (0x08 | 0x40))  # duplicate, or still tentative


def _node_address(addresses: list[str]) -> ResourceSpec:
    message = NodeAddressSpec(addresses=[_prefix(address) for address in addresses])
    return ResourceSpec(bytes(message), {"addresses": addresses, "sortAlgorithm": "v1"})


def _flag_names(flags: int, names: Sequence[str]) -> str:
    """The names of the bits that are set."""
    return ",".join(name for bit, name in enumerate(names) if flags >> bit & 1)


def _name(names: dict[int, str], value: int) -> str:
    return names.get(value, str(value))


def _prefix(text: str) -> NetIpPrefix:
    interface = ip_interface(text)
    return NetIpPrefix(ip=interface.ip.packed, prefix_length=ip_network(text, strict=False).prefixlen)


def _net_ip(text: str) -> NetIp | None:
    if not text:
        return None
    address = IPv6Address(text) if ":" in text else IPv4Address(text)
    return NetIp(ip=address.packed)
