"""Keeps the resources that describe the host: its interfaces and addresses as they change, its name, its firmware's words."""

import asyncio
import socket
from pathlib import Path
from typing import Any, Final

import anyio
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.rtnl import RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR, RTMGRP_LINK

from siderolink.client.maintenance.resources.definitions import (
    ADDRESS_STATUS,
    HOSTNAME_STATUS,
    LINK_STATUS,
    SYSTEM_INFORMATION,
)
from siderolink.client.maintenance.resources.specs import (
    AddressFacts,
    LinkFacts,
    address_status,
    hostname_status,
    link_status,
    system_information,
)
from siderolink.client.maintenance.resources.store import ResourceStore
from siderolink.common.netlink import run_netlink
from siderolink.common.pb.talos.resource.definitions.hardware import SystemInformationSpec
from siderolink.common.readers import read_on

_GROUPS: Final = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR
_RECEIVE_BYTES: Final = 1 << 16
_QUIET_SECONDS: Final = 0.05
"""A host that changes without end is read this often at most."""
_DMI: Final = Path("/sys/class/dmi/id")
_STATES: Final = ("UNKNOWN", "NOTPRESENT", "DOWN", "LOWERLAYERDOWN", "TESTING", "DORMANT", "UP")


async def keep_host_resources(
    store: ResourceStore, *, node_uuid: str, task_status: "anyio.abc.TaskStatus[None]" = anyio.TASK_STATUS_IGNORED
) -> None:
    """Keep the store up to date for ever; started once it has been filled."""
    store.put(HOSTNAME_STATUS, "hostname", hostname_status(socket.gethostname()))
    found = await asyncio.to_thread(read_system_information, node_uuid)
    store.put(SYSTEM_INFORMATION, "systeminformation", system_information(found))
    changed = asyncio.Event()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE) as news:
        news.bind((0, _GROUPS))
        loop = asyncio.get_running_loop()
        loop.add_reader(news, _drain, news, changed)
        try:
            await _read_network(store)
            task_status.started()
            while True:
                await changed.wait()
                changed.clear()
                await _read_network(store)
                await anyio.sleep(_QUIET_SECONDS)
        finally:
            loop.remove_reader(news)


def read_system_information(node_uuid: str, folder: Path = _DMI) -> SystemInformationSpec:
    """What the firmware says of the machine; the UUID is the one it joins with."""

    def read(name: str) -> str:
        try:
            with (folder / name).open("rb") as file:
                return file.read(256).decode(errors="replace").strip()
        except OSError:
            return ""

    return SystemInformationSpec(
        manufacturer=read("sys_vendor"),
        product_name=read("product_name"),
        version=read("product_version"),
        serial_number=read("product_serial"),
        uuid=node_uuid,
        sku_number=read("product_sku"),
    )


def _drain(news: socket.socket, changed: asyncio.Event) -> None:
    """Something changed; what, is read from the kernel itself."""
    while True:
        try:
            news.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            break
        except OSError:  # messages were lost: all the more has changed
            read_on(asyncio.get_running_loop(), news, _drain, news, changed)
    changed.set()


async def _read_network(store: ResourceStore) -> None:
    links, addresses = await run_netlink(_dump)
    store.replace(LINK_STATUS, {name: link_status(link) for name, link in links.items()})
    store.replace(ADDRESS_STATUS, {f"{found.link}/{found.address}": address_status(found) for found in addresses})


async def _dump() -> tuple[dict[str, LinkFacts], list[AddressFacts]]:
    async with AsyncIPRoute() as netlink:
        links = {str(found.get("ifname")): _link(found) async for found in await netlink.link("dump")}
        names = {link.index: name for name, link in links.items()}
        dumped = [found async for found in await netlink.addr("dump")]
    return links, [_address(found, names[found["index"]]) for found in dumped if found["index"] in names]


def _link(found: Any) -> LinkFacts:
    information = found.get("linkinfo")
    state = found.get("operstate") or "UNKNOWN"
    return LinkFacts(
        index=found["index"],
        type=found["ifi_type"],
        flags=found["flags"],
        mtu=found.get("mtu") or 0,
        state=_STATES.index(state) if state in _STATES else 0,
        kind=(information.get("kind") or "") if information else "",
        alias=found.get("ifalias") or "",
        queue=found.get("qdisc") or "",
        master=found.get("master") or 0,
        parent=found.get("link") or 0,
        hardware=_octets(found.get("address")),
        permanent=_octets(found.get("perm_address")),
        broadcast=_octets(found.get("broadcast")),
        carrier=bool(found.get("carrier")),
    )


def _address(found: Any, link: str) -> AddressFacts:
    return AddressFacts(
        address=f"{found.get('address')}/{found['prefixlen']}",
        link_index=found["index"],
        link=link,
        family=found["family"],
        scope=found["scope"],
        flags=found.get("flags") or 0,
        local=found.get("local") or "",
        broadcast=found.get("broadcast") or "",
    )


def _octets(text: object) -> bytes:
    """A hardware address, which may be written in other ways than by colons."""
    try:
        return bytes.fromhex(text.replace(":", "")) if isinstance(text, str) else b""
    except ValueError:
        return b""
