"""What only links of one kind have: from the kernel's message, as another library writes it, to what typed clients decode."""

from typing import Any

import pytest
import yaml
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from siderolink.client.maintenance.resources.kernel_network import describe
from siderolink.common.netlink import HostNetwork, NetworkLink
from siderolink.common.netlink.messages import parse
from siderolink.common.netlink.rtnl import parse_link
from tests.support.machine_stubs import message

SPEC = "talos.resource.definitions.network.LinkStatusSpec"


def read(kind: str, *attributes: tuple[str, object]) -> NetworkLink:
    """A link of this kind, as the kernel describes it."""
    told = ifinfmsg()
    told["index"], told["ifi_type"], told["header"]["type"] = 5, 1, 16
    data = [("IFLA_INFO_DATA", {"attrs": list(attributes)})] if attributes else []
    info = {"attrs": [("IFLA_INFO_KIND", kind), *data]}
    told["attrs"] = [("IFLA_IFNAME", "x"), ("IFLA_LINKINFO", info)]
    told.encode()
    [found] = parse(bytes(told.data))
    link = parse_link(found)
    assert link is not None
    return link


def shown(link: NetworkLink) -> tuple[Any, Any]:
    """The message as Google's library decodes it, and the YAML."""
    spec = describe(HostNetwork({5: link})).links["x"]
    return message(SPEC).FromString(spec.proto), yaml.safe_load(spec.yaml())


def test_a_vlan_has_a_number_and_a_protocol() -> None:
    decoded, text = shown(read("vlan", ("IFLA_VLAN_ID", 7), ("IFLA_VLAN_PROTOCOL", 0x88A8)))
    assert (decoded.vlan.vid, decoded.vlan.protocol) == (7, 0x88A8)
    assert text["vlan"] == {"vlanID": 7, "vlanProtocol": "802.1ad"}


@pytest.mark.parametrize("on", [True, False])
def test_a_bridge_has_its_enabled_features(on: bool) -> None:
    decoded, text = shown(read("bridge", ("IFLA_BR_STP_STATE", int(on)), ("IFLA_BR_VLAN_FILTERING", int(on))))
    assert decoded.HasField("bridge_master")
    assert (decoded.bridge_master.stp.enabled, decoded.bridge_master.vlan.filtering_enabled) == (on, on)
    assert text["bridgeMaster"] == {"stp": {"enabled": on}, "vlan": {"filteringEnabled": on}}


def test_a_vrf_has_a_table() -> None:
    decoded, text = shown(read("vrf", ("IFLA_VRF_TABLE", 254)))
    assert (decoded.vrf_master.table, text["vrfMaster"]) == (254, {"table": "main"})


def test_a_bond_has_its_mode() -> None:
    link = read(
        "bond",
        ("IFLA_BOND_MODE", 4),
        ("IFLA_BOND_ACTIVE_SLAVE", 3),
        ("IFLA_BOND_MIIMON", 100),
        ("IFLA_BOND_USE_CARRIER", 1),
        ("IFLA_BOND_ARP_IP_TARGET", ["192.0.2.1", "192.0.2.7"]),
        ("IFLA_BOND_PRIMARY", 9),
        ("IFLA_BOND_XMIT_HASH_POLICY", 1),
        ("IFLA_BOND_AD_LACP_RATE", 1),
        ("IFLA_BOND_AD_ACTOR_SYS_PRIO", 65535),
        ("IFLA_BOND_TLB_DYNAMIC_LB", 1),
    )
    decoded, text = shown(link)
    bond = decoded.bond_master
    assert (bond.mode, bond.hash_policy, bond.lacp_rate, bond.mii_mon, bond.primary_index) == (4, 1, 1, 100, 9)
    assert (bond.use_carrier, bond.ad_actor_sys_prio, bond.tlb_dynamic_lb, bond.up_delay) == (True, 65535, 1, 0)
    assert [target.ip for target in bond.arpip_targets] == [b"\xc0\x00\x02\x01", b"\xc0\x00\x02\x07"]
    assert text["bondMaster"]["mode"] == "802.3ad"
    assert (text["bondMaster"]["xmitHashPolicy"], text["bondMaster"]["lacpRate"]) == ("layer3+4", "fast")


def test_other_kinds_have_no_details() -> None:
    for link in (read("dummy"), read("vlan"), read("nobody knows it")):
        decoded, text = shown(link)
        assert not any(decoded.HasField(name) for name in ("vlan", "bridge_master", "bond_master", "vrf_master"))
        assert not {"vlan", "bridgeMaster", "bondMaster", "vrfMaster"} & set(text)
