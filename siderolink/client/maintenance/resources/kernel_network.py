"""Reads links, addresses and routes from the kernel's answers and from /sys into resources."""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from siderolink.client.maintenance.host.proc import number, read_text
from siderolink.client.maintenance.resources.network import (
    MAIN_TABLE,
    OTHER_PORT,
    UNKNOWN_DUPLEX,
    AddressFacts,
    LinkFacts,
    RouteFacts,
    address_status,
    link_status,
    node_addresses,
    route_status,
)
from siderolink.client.maintenance.resources.spec import ResourceSpec
from siderolink.common.netlink import Address, HostNetwork, NetworkLink, Route

NET: Final = Path("/sys/class/net")
_MAX_ITEMS: Final = 2048
"""Maximum links, addresses or routes shown."""
_ETHTOOL, _GET_SETTINGS, _SETTINGS_BYTES, _PORT_AT = 0x8946, 0x1, 44, 15
"""The ioctl, its command, and struct ethtool_cmd, of which the byte at 15 is the port."""
_DUPLEX = {"half": 0, "full": 1}


@dataclass(frozen=True, slots=True)
class NetworkResources:
    """Specs of a network's resources by id."""

    links: dict[str, ResourceSpec]
    addresses: dict[str, ResourceSpec]
    routes: dict[str, ResourceSpec]
    node_addresses: dict[str, ResourceSpec]


def describe(network: HostNetwork) -> NetworkResources:
    """Specs of a network's resources. Reads a few files per device (/sys/class/net), so call it in a thread."""
    links = {link.name: _link(link) for link in islice(network.links.values(), _MAX_ITEMS)}
    names = {link.index: name for name, link in links.items()}
    addresses = [_address(found, names[found.interface]) for found in network.addresses if found.interface in names]
    addresses = sorted(addresses, key=lambda one: (one.family, one.link_index, one.scope, one.address))[:_MAX_ITEMS]
    # keep default routes if there are too many
    routes = sorted(network.routes, key=lambda one: (one.destination.prefixlen, one.table != MAIN_TABLE, one.priority))
    described = [_route(route, names) for route in routes[:_MAX_ITEMS]]
    return NetworkResources(
        links={name: link_status(link) for name, link in links.items()},
        addresses={f"{one.link}/{one.address}": address_status(one) for one in addresses},
        routes={route.id: route_status(route) for route in described},
        node_addresses=node_addresses(addresses, links),
    )


def _link(found: NetworkLink) -> LinkFacts:
    bus_path = pci_id = driver = speed = duplex = ""
    port = OTHER_PORT
    if not found.kind and found.name and "/" not in found.name:  # others have no device, and a host may have thousands
        folder = NET / found.name
        bus_path, pci_id, driver = _device(folder / "device")
        port = connector(found.name)
        speed, duplex = read_text(folder / "speed", 32).strip(), read_text(folder / "duplex", 32).strip()
    return LinkFacts(
        index=found.index,
        type=found.type,
        flags=found.flags,
        mtu=found.mtu,
        state=found.operational_state,
        kind=found.kind,
        slave_kind=found.slave_kind,
        alias=found.alias,
        alt_names=found.alternative_names,
        queue=found.queue_discipline,
        master=found.master,
        parent=found.parent,
        hardware=found.hardware_address,
        permanent=found.permanent_address,
        broadcast=found.broadcast_address,
        carrier=found.has_carrier,
        bus_path=bus_path,
        pci_id=pci_id,
        driver=driver,
        speed=number(speed) if len(speed) < 8 else 0,
        duplex=_DUPLEX.get(duplex, UNKNOWN_DUPLEX),
        port=port,
        of_kind=found.of_kind,
    )


def connector(name: str) -> int:
    """An interface's kind of connector (linux/ethtool.h: 0 for twisted pair, 3 for fibre); other if the driver does not say."""
    answer = ctypes.create_string_buffer(_GET_SETTINGS.to_bytes(4, sys.byteorder), _SETTINGS_BYTES)
    request = bytearray(struct.pack("16sP16x", name.encode()[:15], ctypes.addressof(answer)))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _ETHTOOL, request)
    except OSError:
        return OTHER_PORT
    return answer.raw[_PORT_AT]


def _device(device: Path) -> tuple[str, str, str]:
    """Bus path, PCI id and driver of the device behind an interface; empty for a virtual one."""
    if not device.exists():
        return "", "", ""
    real = Path(os.path.realpath(device))
    driver = os.path.basename(os.path.realpath(device / "driver")) if (device / "driver").exists() else ""
    for folder in (real, real.parent):  # a virtio device is below its PCI device
        vendor, product = read_text(folder / "vendor", 16).strip(), read_text(folder / "device", 16).strip()
        if ":" in folder.name and vendor and product:
            return folder.name, f"{vendor[2:].upper()}:{product[2:].upper()}", driver
    return real.name, "", driver


def _address(found: Address, link: str) -> AddressFacts:
    return AddressFacts(
        address=f"{found.address}/{found.prefix_length}",
        link_index=found.interface,
        link=link,
        family=found.family,
        scope=found.scope,
        flags=found.flags,
        local=str(found.local or ""),
        broadcast=str(found.broadcast or ""),
    )


def _route(found: Route, names: dict[int, str]) -> RouteFacts:
    first = found.next_hops[0] if found.next_hops else None
    index = found.interface or (first.interface if first is not None else 0)
    gateway = found.gateway or (first.gateway if first is not None else None)
    return RouteFacts(
        family=found.family,
        destination=str(found.destination) if found.destination.prefixlen else "",
        gateway=str(gateway or ""),
        source=str(found.source or ""),
        link_index=index,
        link=names.get(index, ""),
        table=found.table,
        priority=found.priority,
        scope=found.scope,
        type=found.type,
        flags=found.flags,
        protocol=found.protocol,
        mtu=found.mtu,
    )
