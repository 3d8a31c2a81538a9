"""The parts of a LinkStatus that only links of one kind have: VLANs, bridges, bonds and VRFs."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from siderolink.common.netlink import Bond, Bridge, KindFacts, Vlan, Vrf
from siderolink.common.pb.common import NetIp
from siderolink.common.pb.talos.resource.definitions.network import (
    BondMasterSpec,
    BridgeMasterSpec,
    BridgeVlanSpec,
    StpSpec,
    VlanSpec,
    VrfMasterSpec,
)

TABLES: Final = {0: "unspec", 253: "default", 254: "main", 255: "local"}
_VLAN_PROTOCOLS = {0x8100: "802.1q", 0x88A8: "802.1ad"}
_BOND_MODES = ("balance-rr", "active-backup", "balance-xor", "broadcast", "802.3ad", "balance-tlb", "balance-alb")
_HASH_POLICIES = ("layer2", "layer3+4", "layer2+3", "encap2+3", "encap3+4", "vlan+srcmac")
_ARP_VALIDATE = ("none", "active", "backup", "all")


def kind_fields(facts: KindFacts | None) -> tuple[dict[str, Any], dict[str, object]]:
    """Fields of the message, and of its YAML form."""
    match facts:
        case Vlan(id=number, protocol=protocol):
            shown = {"vlanID": number, "vlanProtocol": _VLAN_PROTOCOLS.get(protocol, str(protocol))}
            return {"vlan": VlanSpec(vid=number, protocol=protocol)}, {"vlan": shown}
        case Bridge(has_stp=stp, filters_vlans=filtering):
            message = BridgeMasterSpec(stp=StpSpec(enabled=stp), vlan=BridgeVlanSpec(filtering_enabled=filtering))
            return {"bridge_master": message}, {
                "bridgeMaster": {"stp": {"enabled": stp}, "vlan": {"filteringEnabled": filtering}}
            }
        case Vrf(table=table):
            return {"vrf_master": VrfMasterSpec(table=table)}, {"vrfMaster": {"table": TABLES.get(table, str(table))}}
        case Bond():
            return {"bond_master": _bond(facts)}, {"bondMaster": _shown_bond(facts)}
    return {}, {}


def _bond(bond: Bond) -> BondMasterSpec:
    return BondMasterSpec(
        mode=bond.mode,
        hash_policy=bond.hash_policy,
        lacp_rate=bond.lacp_rate,
        arp_validate=bond.arp_validate,
        arp_all_targets=bond.arp_all_targets,
        primary_index=bond.primary or 0,
        primary_reselect=bond.primary_reselect,
        fail_over_mac=bond.fail_over_mac,
        ad_select=bond.ad_select,
        mii_mon=bond.mii_monitor,
        up_delay=bond.up_delay,
        down_delay=bond.down_delay,
        arp_interval=bond.arp_interval,
        resend_igmp=bond.resend_igmp,
        min_links=bond.min_links,
        lp_interval=bond.learn_packet_interval,
        packets_per_slave=bond.packets_per_slave,
        num_peer_notif=bond.peer_notifications,
        tlb_dynamic_lb=bond.tlb_dynamic,
        all_slaves_active=bond.all_slaves_active,
        use_carrier=bool(bond.use_carrier),
        ad_actor_sys_prio=bond.ad_actor_system_priority,
        ad_user_port_key=bond.ad_user_port_key,
        peer_notify_delay=bond.peer_notification_delay,
        arpip_targets=[NetIp(ip=target.packed) for target in bond.arp_targets],
        nsip6_targets=[NetIp(ip=target.packed) for target in bond.ns_targets],
        adlacp_active=bond.lacp_active,
        missed_max=bond.missed_max,
    )


def _shown_bond(bond: Bond) -> Mapping[str, object]:
    where_set: dict[str, object] = {
        "primary": bond.primary,
        "miimon": bond.mii_monitor,
        "updelay": bond.up_delay,
        "downdelay": bond.down_delay,
        "arpInterval": bond.arp_interval,
        "resendIgmp": bond.resend_igmp,
        "minLinks": bond.min_links,
        "lpInterval": bond.learn_packet_interval,
        "packetsPerSlave": bond.packets_per_slave,
        "numPeerNotif": bond.peer_notifications,
        "tlbLogicalLb": bond.tlb_dynamic,
        "allSlavesActive": bond.all_slaves_active,
        "useCarrier": bool(bond.use_carrier),
        "adActorSysPrio": bond.ad_actor_system_priority,
        "adUserPortKey": bond.ad_user_port_key,
        "peerNotifyDelay": bond.peer_notification_delay,
        "arpIPTargets": [str(target) for target in bond.arp_targets],
        "nsIP6Targets": [str(target) for target in bond.ns_targets],
        "missedMax": bond.missed_max,
    }
    return {
        "mode": _name(_BOND_MODES, bond.mode),
        "xmitHashPolicy": _name(_HASH_POLICIES, bond.hash_policy),
        "lacpRate": _name(("slow", "fast"), bond.lacp_rate),
        "arpValidate": _name(_ARP_VALIDATE, bond.arp_validate),
        "arpAllTargets": _name(("any", "all"), bond.arp_all_targets),
        "primaryReselect": _name(("always", "better", "failure"), bond.primary_reselect),
        "failOverMac": _name(("none", "active", "follow"), bond.fail_over_mac),
        "adSelect": _name(("stable", "bandwidth", "count"), bond.ad_select),
        **{name: value for name, value in where_set.items() if value},
    }


def _name(names: Sequence[str], value: int) -> str:
    return names[value] if value < len(names) else str(value)
