"""Specs of a machine's resources, each in both forms. Numbers of the kernel stay numbers in protobuf."""

from collections.abc import Mapping
from datetime import timedelta
from ipaddress import IPv6Address, IPv6Network

import betterproto2

from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.hostport import HostPort
from siderolink.common.join_url import JoinURL
from siderolink.common.keys import PrivateKey
from siderolink.common.pb.common import NetIpPort, NetIpPrefix
from siderolink.common.pb.talos.resource.definitions.block import DiskSpec
from siderolink.common.pb.talos.resource.definitions.config import MachineConfigSpec
from siderolink.common.pb.talos.resource.definitions.hardware import (
    MemoryModuleSpec,
    ProcessorSpec,
    SystemInformationSpec,
)
from siderolink.common.pb.talos.resource.definitions.network import (
    HostnameStatusSpec,
    LinkSpecSpec,
    WireguardPeer,
    WireguardSpec,
)
from siderolink.common.pb.talos.resource.definitions.runtime import (
    KernelCmdlineSpec,
    MachineStatusSpec,
    MachineStatusStatus,
    MetaKeySpec,
    PlatformMetadataSpec,
    SecurityStateSpec,
    UniqueMachineTokenSpec,
    VersionSpec,
)
from siderolink.common.pb.talos.resource.definitions.siderolink import ConfigSpec, StatusSpec, TunnelSpec

_LINK_NONE = 65534
_OPERATOR_LAYER = 3
_MAINTENANCE = 3
_SE_LINUX = ("disabled", "permissive", "enforcing")


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
    """The desired WireGuard interface, with its private key if that is given."""
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
        "type": "nohdr",
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


MACHINE_CONFIG_ANNOTATIONS = {"talos.dev/yaml-spec": "1"}
"""Marks for existing clients that the YAML form of the spec is one text; only the key matters."""


def machine_config(documents: bytes) -> ResourceSpec:
    """A configuration as it was sent: one text, because it may hold several documents."""
    message = MachineConfigSpec(yaml_marshalled=documents)
    return ResourceSpec.of_text(bytes(message), documents.decode(errors="replace"))


def _known(message: betterproto2.Message, names: Mapping[str, str], always: frozenset[str] = frozenset()) -> ResourceSpec:
    """A spec from a message. `names` maps its fields to YAML keys; empty fields are omitted unless in `always`."""
    fields = {shown: getattr(message, name) for name, shown in names.items()}
    return ResourceSpec(bytes(message), {name: value for name, value in fields.items() if value or name in always})


_PROCESSOR = {
    "socket": "socket",
    "manufacturer": "manufacturer",
    "product_name": "productName",
    "max_speed": "maxSpeedMhz",
    "boot_speed": "bootSpeedMhz",
    "status": "status",
    "serial_number": "serialNumber",
    "asset_tag": "assetTag",
    "part_number": "partNumber",
    "core_count": "coreCount",
    "core_enabled": "coreEnabled",
    "thread_count": "threadCount",
}
_MEMORY = {
    "size": "sizeMiB",
    "device_locator": "deviceLocator",
    "bank_locator": "bankLocator",
    "speed": "speed",
    "manufacturer": "manufacturer",
    "serial_number": "serialNumber",
    "asset_tag": "assetTag",
    "product_name": "productName",
}
_DISK = {
    "dev_path": "dev_path",
    "size": "size",
    "pretty_size": "pretty_size",
    "io_size": "io_size",
    "sector_size": "sector_size",
    "readonly": "readonly",
    "cdrom": "cdrom",
    "model": "model",
    "serial": "serial",
    "modalias": "modalias",
    "wwid": "wwid",
    "uuid": "uuid",
    "bus_path": "bus_path",
    "sub_system": "sub_system",
    "transport": "transport",
    "rotational": "rotational",
    "secondary_disks": "secondary_disks",
    "firmware_version": "firmware_version",
}
_DISK_ALWAYS = frozenset({"dev_path", "size", "pretty_size", "io_size", "sector_size", "readonly", "cdrom"})


def processor(found: ProcessorSpec) -> ResourceSpec:
    return _known(found, _PROCESSOR)


def memory_module(found: MemoryModuleSpec) -> ResourceSpec:
    return _known(found, _MEMORY)


def disk(found: DiskSpec) -> ResourceSpec:
    return _known(found, _DISK, _DISK_ALWAYS)


def platform_metadata(platform: str, hostname: str) -> ResourceSpec:
    message = PlatformMetadataSpec(platform=platform, hostname=hostname)
    return ResourceSpec(bytes(message), {"platform": platform, "hostname": hostname})


def meta_key(value: bytes) -> ResourceSpec:
    """A META value as text; bytes that are not UTF-8 are replaced."""
    text = value.decode(errors="replace")
    return ResourceSpec(bytes(MetaKeySpec(value=text)), {"value": text})


def unique_token_spec(token: str) -> ResourceSpec:
    return ResourceSpec(bytes(UniqueMachineTokenSpec(token=token)), {"token": token})


def machine_status() -> ResourceSpec:
    """A machine in maintenance, which is always ready."""
    message = MachineStatusSpec(stage=_MAINTENANCE, status=MachineStatusStatus(ready=True))
    return ResourceSpec(bytes(message), {"stage": "maintenance", "status": {"ready": True, "unmetConditions": []}})


def version(tag: str) -> ResourceSpec:
    return ResourceSpec(bytes(VersionSpec(version=tag, name="Talos")), {"version": tag, "name": "Talos"})


def security_state(*, secure_boot: bool, se_linux: int, fips: bool, signed_modules: bool) -> ResourceSpec:
    message = SecurityStateSpec(
        secure_boot=secure_boot, se_linux_state=se_linux, fips_state=int(fips), module_signature_enforced=signed_modules
    )
    fields = {
        "secureBoot": secure_boot,
        "selinuxState": _SE_LINUX[se_linux],
        "bootedWithUKI": False,
        "fipsState": "enabled" if fips else "disabled",
        "moduleSignatureEnforced": signed_modules,
    }
    return ResourceSpec(bytes(message), fields)


def kernel_cmdline(text: str) -> ResourceSpec:
    return ResourceSpec(bytes(KernelCmdlineSpec(cmdline=text)), {"cmdline": text})
