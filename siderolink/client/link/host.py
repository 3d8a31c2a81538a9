"""The host's services for a link: a device, notice of network, interface and clock changes, and probes."""

import errno
import socket
from contextlib import AbstractAsyncContextManager, ExitStack, closing, suppress
from functools import partial
from ipaddress import IPv6Address, IPv6Interface, IPv6Network, ip_address
from typing import TYPE_CHECKING, Protocol

import anyio
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from siderolink.client.link.probes import is_answered, large_packets_pass, shake_hands_beside
from siderolink.client.link.signals import ClockJumped, NetworkChanged, Put, Repaired, ServerLeaves
from siderolink.common.addressing import server_address
from siderolink.common.backoff import Backoff
from siderolink.common.clock_watch import ClockWatch
from siderolink.common.errors import DeviceError, OverlayInUseError, SideroLinkError
from siderolink.common.goodbye import Goodbye, hear_moves, say_goodbye
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.common.netlink import NetworkChange, NetworkWatch, OutgoingRoute, call_in, enable_ipv6, route_to, run_netlink
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.transport.choice import Route
from siderolink.common.wireguard.device import (
    Device,
    DeviceConfig,
    DeviceKind,
    Interface,
    InterfaceLost,
    Network,
    OnDeviceEvent,
)
from siderolink.common.wireguard.opening import open_device

if TYPE_CHECKING:
    from siderolink.common.wireguard.noise import Timestamps


class Host(Protocol):
    """The host's services for a link. Tests and simulations substitute their own."""

    def open_device(
        self, kind: DeviceKind, config: DeviceConfig, on_event: OnDeviceEvent
    ) -> AbstractAsyncContextManager[Device]: ...

    async def check_overlay(self, overlay: IPv6Network, interface: str) -> None:
        """Raises OverlayInUseError if another interface has an address in the overlay."""

    async def watch(self, device: Device, config: DeviceConfig, put: Put) -> None:
        """Report network, interface and clock changes until cancelled."""

    def way_out(self, remote: str) -> OutgoingRoute | None:
        """How packets to `remote` leave; None if there is no route."""

    async def is_answered(self, interface: str, server: IPv6Address) -> bool:
        """See `probes`."""

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        """See `probes`."""

    async def shake_hands_beside(
        self,
        key: PrivateKey,
        server_key: PublicKey,
        route: Route,
        timestamps: "Timestamps",
        *,
        udp: bool,
        timeout: float,
        echo: tuple[IPv6Address, IPv6Address] | None,
    ) -> str | None:
        """See `probes`."""

    async def say_goodbye(self, device: Device, source: IPv6Address, server: IPv6Address) -> None:
        """Tell the server that the session ends, so that it accepts the machine's next start at once."""


class ThisHost:
    """The network namespace of the calling thread; the interface may be in another one."""

    def __init__(self, namespace: str | None = None) -> None:
        self._namespace = namespace

    def open_device(
        self, kind: DeviceKind, config: DeviceConfig, on_event: OnDeviceEvent
    ) -> AbstractAsyncContextManager[Device]:
        return open_device(kind, config, on_event)

    async def check_overlay(self, overlay: IPv6Network, interface: str) -> None:
        holder = await overlay_holder(overlay, interface, self._namespace)
        if holder is not None:
            raise OverlayInUseError(
                f"the interface {holder} already has an address in the overlay {overlay}, and two servers in one overlay "
                "cannot be distinguished: stop that link, or use another network namespace"
            )

    async def watch(self, device: Device, config: DeviceConfig, put: Put) -> None:
        gone = InterfaceLost(reason=f"the interface {device.name} was deleted or moved by someone else")
        try:
            guard = InterfaceGuard(device.name, config.addresses, self._namespace)
        except OSError:
            put(gone)
            return
        is_here = self._namespace is None
        own = {guard.index} if is_here else set[int]()

        def on_change(change: NetworkChange) -> None:
            if is_here:
                guard.on_change(change)
            if change.lost or change.interfaces - own:
                put(NetworkChanged(change.carriers))

        async def repair() -> None:
            while True:
                what = await guard.next_repair()
                if what is None:
                    put(gone)
                    return
                put(Repaired(what))

        with ExitStack() as stack:
            stack.enter_context(closing(NetworkWatch(on_change)))
            if not is_here:
                stack.enter_context(closing(NetworkWatch(guard.on_change, self._namespace)))
            stack.enter_context(closing(ClockWatch(lambda: put(ClockJumped()))))
            async with background_tasks() as tasks:
                tasks.start_soon(repair)
                tasks.start_soon(
                    keep_running, "hearing of a server that leaves", partial(self._hear_moves, device, config, put)
                )
                await anyio.sleep_forever()

    async def _hear_moves(self, device: Device, config: DeviceConfig, put: Put) -> None:
        for address in config.addresses[:1]:
            if isinstance(address, IPv6Interface):
                with suppress(SideroLinkError):  # another program has the port; the link works without it
                    await hear_moves(
                        lambda key: put(ServerLeaves(key)),
                        address=address.ip,
                        server=server_address(address.network),
                        interface=device.name,
                        namespace=self._namespace,
                    )

    def way_out(self, remote: str) -> OutgoingRoute | None:
        return route_to(remote)

    async def is_answered(self, interface: str, server: IPv6Address) -> bool:
        return await is_answered(interface, server, self._namespace)

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        return await large_packets_pass(interface, server, self._namespace)

    async def shake_hands_beside(
        self,
        key: PrivateKey,
        server_key: PublicKey,
        route: Route,
        timestamps: "Timestamps",
        *,
        udp: bool,
        timeout: float,
        echo: tuple[IPv6Address, IPv6Address] | None,
    ) -> str | None:
        return await shake_hands_beside(key, server_key, route, timestamps, udp=udp, timeout=timeout, echo=echo)

    async def say_goodbye(self, device: Device, source: IPv6Address, server: IPv6Address) -> None:
        goodbye = Goodbye(public_key=device.public_key)
        await say_goodbye(goodbye, source=source, server=server, interface=device.name, namespace=self._namespace)


_IFA_F_NODAD = 0x02
_UP = 1
_CALM = 60.0
"""Seconds after which a repair no longer counts as a repetition of the last one."""


class InterfaceGuard:
    """Checks one interface whenever the kernel reports a change to it, and restores what is missing."""

    def __init__(self, name: str, addresses: tuple[Interface, ...], namespace: str | None) -> None:
        """Raises OSError where there is no such interface."""
        self.index = call_in(namespace, partial(socket.if_nametoindex, name))
        self._namespace = namespace
        self._addresses = addresses
        self._changed = anyio.Event()
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
            what = await run_netlink(partial(_repair, self.index, self._addresses), self._namespace)
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
                with suppress(OSError):  # it has gone meanwhile
                    name = socket.if_indextoname(found["index"])
                    if name != own_name:
                        return name
    return None


async def _repair(index: int, addresses: tuple[Interface, ...]) -> list[str] | None:
    """Restore what is missing and describe it. None if the interface itself is gone."""
    try:
        async with AsyncIPRoute() as ipr:
            [link] = await ipr.link("get", index=index)
            missing = []
            if not link["flags"] & _UP:
                await ipr.link("set", index=index, state="up")
                missing.append("it was set down")
            missing += await _repair_addresses(ipr, index, addresses)
            return missing + await _repair_routes(ipr, index, addresses)
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENXIO):
            return None
        return []  # it changed while it was read; the next event reports it


async def _repair_addresses(ipr: AsyncIPRoute, index: int, addresses: tuple[Interface, ...]) -> list[str]:
    present = {found.get_attr("IFA_ADDRESS") async for found in await ipr.addr("dump", index=index)}
    missing = [address for address in addresses if str(address.ip) not in present]
    if any(address.version == 6 for address in missing):
        with suppress(OSError, DeviceError):  # it is gone, or IPv6 stays off: then the address cannot be added either
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
