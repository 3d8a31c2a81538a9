"""Keeps a link's interface as it was configured: restores its name, MTU, state, addresses and routes when another program
changes or removes them.
"""

import errno
import socket
from contextlib import suppress
from functools import partial
from ipaddress import ip_address

import anyio
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from siderolink.common.backoff import Backoff
from siderolink.common.errors import DeviceError
from siderolink.common.netlink import NetworkChange, call_in, enable_ipv6, run_netlink
from siderolink.common.wireguard.device import DeviceConfig, Interface, Network

_IFA_F_NODAD = 0x02
_UP = 1
_CALM = 60.0
"""Seconds after which a repair no longer counts as a repetition of the last one."""


class InterfaceGuard:
    """Checks one interface whenever the kernel reports a change to it, and restores what is missing."""

    def __init__(self, config: DeviceConfig) -> None:
        """Raises OSError if there is no such interface."""
        self.index = call_in(config.namespace, partial(socket.if_nametoindex, config.name))
        self._namespace = config.namespace
        self._config = config
        self._changed = anyio.Event()
        self._changed.set()  # it may have been changed before, and an earlier guard may have failed to restore it
        self._backoff = Backoff(first=0.2, cap=10.0, at_once=True)
        self._repaired_at = -_CALM
        self._pause = 0.0

    def on_change(self, change: NetworkChange) -> None:
        if change.lost or self.index in change.interfaces:
            self._changed.set()

    async def next_repair(self) -> str | None:
        """Wait for a repair and return what it restored; None once the interface is gone.

        Repeated removals are repaired with growing delays.
        """
        while True:
            await self._changed.wait()
            self._changed = anyio.Event()
            if anyio.current_time() - self._repaired_at < _CALM:
                await anyio.sleep(self._pause)
            else:
                self._backoff.reset()
            what = await run_netlink(partial(_repair, self.index, self._config), self._namespace)
            if what is None:
                return None
            if what:
                self._repaired_at, self._pause = anyio.current_time(), self._backoff.next()
                return ", ".join(what)


async def overlay_holder(overlay: Network, own_name: str, namespace: str | None) -> str | None:
    """Another interface that has an address within the overlay, or None."""
    return await run_netlink(partial(_find_holder, overlay, own_name), namespace)


async def _find_holder(overlay: Network, own_name: str) -> str | None:
    async with AsyncIPRoute() as ipr:
        async for found in await ipr.addr("dump", family=socket.AF_INET6):
            if ip_address(found.get_attr("IFA_ADDRESS")) in overlay:
                with suppress(OSError):  # it was just removed
                    name = socket.if_indextoname(found["index"])
                    if name != own_name:
                        return name
    return None


async def _repair(index: int, config: DeviceConfig) -> list[str] | None:
    """Restore what is missing and describe it. None if the interface itself is gone."""
    addresses = config.addresses
    try:
        async with AsyncIPRoute() as ipr:
            [link] = await ipr.link("get", index=index)
            missing = await _repair_name(ipr, index, link.get_attr("IFLA_IFNAME"), config.name)
            mtu = link.get_attr("IFLA_MTU")
            if mtu != config.mtu:
                await ipr.link("set", index=index, mtu=config.mtu)
                missing.append(f"its MTU was set to {mtu}")
            if not link["flags"] & _UP:
                await ipr.link("set", index=index, state="up")
                missing.append("it was set down")
            missing += await _repair_addresses(ipr, index, addresses)
            return missing + await _repair_routes(ipr, index, addresses)
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENXIO):
            return None
        return []  # it changed while it was read; the next event reports it


async def _repair_name(ipr: AsyncIPRoute, index: int, name: str, wanted: str) -> list[str]:
    """The firewalls of the host and of the machine know the interface by its name."""
    if name == wanted:
        return []
    try:
        await ipr.link("set", index=index, ifname=wanted)
    except NetlinkError as error:
        if error.code in (errno.EEXIST, errno.EBUSY):  # another interface has the name, or Linux before 6.2 and it is up
            return []
        raise
    return [f"it was renamed to {name}"]


async def _repair_addresses(ipr: AsyncIPRoute, index: int, addresses: tuple[Interface, ...]) -> list[str]:
    present = {found.get_attr("IFA_ADDRESS") async for found in await ipr.addr("dump", index=index)}
    missing = [address for address in addresses if str(address.ip) not in present]
    if any(address.version == 6 for address in missing):
        with suppress(OSError, DeviceError):  # it is gone or IPv6 is disabled; then the address cannot be added either
            enable_ipv6(socket.if_indextoname(index))
    for address in missing:
        flags = _IFA_F_NODAD if address.version == 6 else 0
        await ipr.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, flags=flags)
    return [f"the address {address} was removed" for address in missing]


async def _repair_routes(ipr: AsyncIPRoute, index: int, addresses: tuple[Interface, ...]) -> list[str]:
    present = {
        (route.get_attr("RTA_DST"), route["dst_len"])
        for family in (socket.AF_INET, socket.AF_INET6)
        async for route in await ipr.route("dump", family=family, oif=index)
    }
    repaired = []
    for network in dict.fromkeys(address.network for address in addresses):
        if (str(network.network_address), network.prefixlen) not in present:
            family = socket.AF_INET6 if network.version == 6 else socket.AF_INET
            await ipr.route("replace", dst=str(network), oif=index, family=family)
            repaired.append(f"the route to {network} was removed")
    return repaired
