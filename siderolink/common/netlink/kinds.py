"""The kind-specific data of links (IFLA_INFO_DATA of linux/if_link.h): VLANs, bridges, bonds and VRFs.

Timers and counters, which change all the time, are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from siderolink.common.netlink.messages import attributes, number, values


@dataclass(frozen=True, slots=True)
class Vlan:
    """A VLAN on top of another link."""

    id: int
    protocol: int
    """The Ethernet type: 0x8100 for 802.1q, 0x88a8 for 802.1ad."""


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge, with its links as slaves."""

    has_stp: bool
    filters_vlans: bool


@dataclass(frozen=True, slots=True)
class Vrf:
    """A routing domain."""

    table: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bond:
    """A bond. Numbers are the kernel's (linux/if_bonding.h); times are in milliseconds."""

    mode: int = 0
    hash_policy: int = 0
    lacp_rate: int = 0
    arp_validate: int = 0
    arp_all_targets: int = 0
    primary: int | None = None
    """A link's index."""
    primary_reselect: int = 0
    fail_over_mac: int = 0
    ad_select: int = 0
    mii_monitor: int = 0
    up_delay: int = 0
    down_delay: int = 0
    arp_interval: int = 0
    resend_igmp: int = 0
    min_links: int = 0
    learn_packet_interval: int = 0
    packets_per_slave: int = 0
    peer_notifications: int = 0
    tlb_dynamic: int = 0
    all_slaves_active: int = 0
    use_carrier: int = 0
    ad_actor_system_priority: int = 0
    ad_user_port_key: int = 0
    peer_notification_delay: int = 0
    lacp_active: int = 0
    missed_max: int = 0
    arp_targets: tuple[IPv4Address, ...] = ()
    ns_targets: tuple[IPv6Address, ...] = ()


KindFacts = Vlan | Bridge | Vrf | Bond

_BOND: Final = {
    "mode": 1,
    "mii_monitor": 3,
    "up_delay": 4,
    "down_delay": 5,
    "use_carrier": 6,
    "arp_interval": 7,
    "arp_validate": 9,
    "arp_all_targets": 10,
    "primary_reselect": 12,
    "fail_over_mac": 13,
    "hash_policy": 14,
    "resend_igmp": 15,
    "peer_notifications": 16,
    "all_slaves_active": 17,
    "min_links": 18,
    "learn_packet_interval": 19,
    "packets_per_slave": 20,
    "lacp_rate": 21,
    "ad_select": 22,
    "ad_actor_system_priority": 24,
    "ad_user_port_key": 25,
    "tlb_dynamic": 27,
    "peer_notification_delay": 28,
    "lacp_active": 29,
    "missed_max": 30,
}
_BOND_ARP_TARGETS, _BOND_PRIMARY, _BOND_NS_TARGETS = 8, 11, 31


def parse_kind(kind: str, data: bytes) -> KindFacts | None:
    """None for kinds whose data is not read here."""
    if not data:
        return None
    found = values(data)
    match kind:
        case "vlan":
            return Vlan(number(found.get(1, b"")), int.from_bytes(found.get(5, b""), "big"))
        case "bridge":
            return Bridge(bool(number(found.get(5, b""))), bool(number(found.get(7, b""))))
        case "vrf":
            return Vrf(number(found.get(1, b"")))
        case "bond":
            return _parse_bond(found)
    return None


def _parse_bond(found: Mapping[int, bytes]) -> Bond:
    numbers = {name: number(found.get(kind, b"")) for name, kind in _BOND.items()}
    return Bond(
        **numbers,
        primary=number(found[_BOND_PRIMARY]) if _BOND_PRIMARY in found else None,
        arp_targets=tuple(IPv4Address(target) for target in _targets(found.get(_BOND_ARP_TARGETS, b""), 4)),
        ns_targets=tuple(IPv6Address(target) for target in _targets(found.get(_BOND_NS_TARGETS, b""), 16)),
    )


def _targets(data: bytes, size: int) -> list[bytes]:
    return [data[start:end] for _, start, end in attributes(data) if end - start == size]
