"""What a machine's resources say, each written once for both forms. Numbers of the kernel stay numbers in protobuf."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_interface

from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.common import NetIp, NetIpPort, NetIpPrefix
from siderolink.common.pb.talos.resource.definitions.config import MachineConfigSpec
from siderolink.common.pb.talos.resource.definitions.hardware import SystemInformationSpec
from siderolink.common.pb.talos.resource.definitions.network import (
    AddressStatusSpec,
    HostnameStatusSpec,
    LinkSpecSpec,
    LinkStatusSpec,
    WireguardPeer,
    WireguardSpec,
)
from siderolink.common.pb.talos.resource.definitions.siderolink import ConfigSpec, StatusSpec, TunnelSpec

_STATES = ("unknown", "notPresent", "down", "lowerLayerDown", "testing", "dormant", "up")
_LINK_TYPES = {1: "ether", 772: "loopback", 776: "sit", 778: "gre", 65534: "none"}
_FAMILIES = {2: "inet4", 10: "inet6"}
# by bit, the lowest first
_LINK_FLAGS = (
    *("UP", "BROADCAST", "DEBUG", "LOOPBACK", "POINTOPOINT", "NOTRAILERS", "RUNNING", "NOARP", "PROMISC", "ALLMULTI", "MASTER"),
    *("SLAVE", "MULTICAST", "PORTSEL", "AUTOMEDIA", "DYNAMIC", "LOWER_UP", "DORMANT", "ECHO"),
)
_ADDRESS_FLAGS = (
    *("temporary", "nodad", "optimistic", "dadfailed", "homeaddress", "deprecated", "tentative", "permanent", "mngmtmpaddr"),
    *("noprefixroute", "mcautojoin", "stableprivacy"),
)
_SCOPES = {0: "global", 200: "site", 253: "link", 254: "host", 255: "nowhere"}
_LINK_NONE = 65534
_OPERATOR_LAYER = 3
_UNKNOWN_PORT, _UNKNOWN_DUPLEX = 255, 255


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    """An interface as the kernel describes it."""

    index: int
    type: int
    flags: int
    mtu: int
    state: int
    kind: str = ""
    alias: str = ""
    queue: str = ""
    master: int = 0
    parent: int = 0
    hardware: bytes = b""
    permanent: bytes = b""
    broadcast: bytes = b""
    carrier: bool = False


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


def link_status(link: LinkFacts) -> ResourceSpec:
    message = LinkStatusSpec(
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
        link_state=link.carrier,
        port=_UNKNOWN_PORT,
        duplex=_UNKNOWN_DUPLEX,
        permanent_addr=link.permanent,
        alias=link.alias,
    )
    fields: dict[str, object] = {
        "alias": link.alias,
        "index": link.index,
        "type": _LINK_TYPES.get(link.type, str(link.type)),
        "linkIndex": link.parent,
        "flags": _flag_names(link.flags, _LINK_FLAGS),
        "hardwareAddr": link.hardware.hex(":"),
        "permanentAddr": link.permanent.hex(":"),
        "broadcastAddr": link.broadcast.hex(":"),
        "mtu": link.mtu,
        "queueDisc": link.queue,
        "masterIndex": link.master,
        "operationalState": _STATES[link.state] if link.state < len(_STATES) else str(link.state),
        "kind": link.kind,
        "slaveKind": "",
        "linkState": link.carrier,
    }
    return ResourceSpec(bytes(message), fields)


def address_status(found: AddressFacts) -> ResourceSpec:
    interface = ip_interface(found.address)
    message = AddressStatusSpec(
        address=NetIpPrefix(ip=interface.ip.packed, prefix_length=interface.network.prefixlen),
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
        "family": _FAMILIES.get(found.family, str(found.family)),
        "scope": _SCOPES.get(found.scope, str(found.scope)),
        "flags": _flag_names(found.flags, _ADDRESS_FLAGS),
    }
    return ResourceSpec(bytes(message), fields)


def hostname_status(hostname: str) -> ResourceSpec:
    host, _, domain = hostname.partition(".")
    message = HostnameStatusSpec(hostname=host, domainname=domain)
    return ResourceSpec(bytes(message), {"hostname": host, "domainname": domain})


def system_information(found: SystemInformationSpec) -> ResourceSpec:
    fields: dict[str, object] = {
        "manufacturer": found.manufacturer,
        "productName": found.product_name,
        "version": found.version,
        "serialnumber": found.serial_number,
        "uuid": found.uuid,
        "wakeUpType": found.wake_up_type,
        "skuNumber": found.sku_number,
    }
    return ResourceSpec(bytes(found), {name: value for name, value in fields.items() if value})


def siderolink_status(url: JoinURL, *, connected: bool, link: str, tunnel: bool) -> ResourceSpec:
    message = StatusSpec(host=url.host, connected=connected, link_name=link, grpc_tunnel=tunnel)
    fields = {"host": url.host, "connected": connected, "linkName": link, "grpcTunnel": tunnel}
    return ResourceSpec(bytes(message), fields)


def siderolink_config(url: JoinURL) -> ResourceSpec:
    host, endpoint = str(HostPort(url.host, url.port)), url.encode()
    token = url.join_token or ""
    message = ConfigSpec(api_endpoint=endpoint, host=host, join_token=token, insecure=not url.tls, tunnel=url.tunnel)
    fields = {
        "apiEndpoint": endpoint,
        "host": host,
        "joinToken": token,
        "insecure": not url.tls,
        "tunnel": url.tunnel,
    }
    return ResourceSpec(bytes(message), fields)


def siderolink_tunnel(url: JoinURL, *, link: str, mtu: int, address: IPv6Address, port: int) -> ResourceSpec:
    endpoint = url.encode()
    message = TunnelSpec(api_endpoint=endpoint, link_name=link, mtu=mtu, node_address=NetIpPort(ip=address.packed, port=port))
    fields = {"apiEndpoint": endpoint, "linkName": link, "mtu": mtu, "nodeAddress": f"[{address}]:{port}"}
    return ResourceSpec(bytes(message), fields)


def link_spec(
    link: str, *, mtu: int, server_key: str, server: IPv6Address, endpoint: str, keepalive: int, private_key: PrivateKey | None
) -> ResourceSpec:
    """The WireGuard interface as it shall be, with its private key where that is given."""
    secret = {} if private_key is None else {"privateKey": private_key.encode()}
    allowed = IPv6Network(server)
    peer = WireguardPeer(
        public_key=server_key,
        endpoint=endpoint,
        persistent_keepalive_interval=timedelta(seconds=keepalive),
        allowed_ips=[NetIpPrefix(ip=allowed.network_address.packed, prefix_length=allowed.prefixlen)],
    )
    message = LinkSpecSpec(
        name=link,
        logical=True,
        up=True,
        mtu=mtu,
        kind="wireguard",
        type=_LINK_NONE,
        wireguard=WireguardSpec(private_key=secret.get("privateKey", ""), peers=[peer]),
        config_layer=_OPERATOR_LAYER,
    )
    fields: dict[str, object] = {
        "name": link,
        "logical": True,
        "up": True,
        "mtu": mtu,
        "kind": "wireguard",
        "type": "none",
        "wireguard": {
            **secret,
            "listenPort": 0,
            "firewallMark": 0,
            "peers": [
                {
                    "publicKey": server_key,
                    "presharedKey": "",
                    "endpoint": endpoint,
                    "persistentKeepaliveInterval": f"{keepalive}s",
                    "allowedIPs": [str(allowed)],
                }
            ],
        },
        "layer": "operator",
    }
    return ResourceSpec(bytes(message), fields)


MACHINE_CONFIG_ANNOTATIONS = {"siderolink/spec": "text"}
"""Existing clients take the spec of a machine configuration for text, and not for YAML, where there is any annotation."""


def machine_config(documents: bytes) -> ResourceSpec:
    """The configuration as it was applied: a text, for it may be several documents."""
    message = MachineConfigSpec(yaml_marshalled=documents)
    return ResourceSpec.of_text(bytes(message), documents.decode(errors="replace"))


def _flag_names(flags: int, names: Sequence[str]) -> str:
    """The names of the bits that are set."""
    return ",".join(name for bit, name in enumerate(names) if flags >> bit & 1)


def _net_ip(text: str) -> NetIp | None:
    if not text:
        return None
    address = IPv6Address(text) if ":" in text else IPv4Address(text)
    return NetIp(ip=address.packed)
