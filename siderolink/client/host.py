"""What a link needs of the host it runs on: a device, and news of the network, of its interface and of the clock."""

from contextlib import AbstractAsyncContextManager, ExitStack, closing
from ipaddress import IPv6Address, IPv6Network
from typing import Protocol

import anyio

from siderolink.client.echo_probe import is_answered, large_packets_pass
from siderolink.client.guard import InterfaceGuard, overlay_holder
from siderolink.client.signals import ClockJumped, NetworkChanged, Put, Repaired
from siderolink.common.clock_watch import ClockWatch
from siderolink.common.errors import OverlayInUseError
from siderolink.common.network_watch import NetworkChange, NetworkWatch, WayOut, way_out
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.device import (
    Device,
    DeviceConfig,
    DeviceKind,
    InterfaceLost,
    OnDeviceEvent,
)
from siderolink.common.wireguard.opening import open_device


class Host(Protocol):
    """What a link asks of its surroundings; a test or a simulation has others."""

    def open_device(
        self, kind: DeviceKind, config: DeviceConfig, on_event: OnDeviceEvent
    ) -> AbstractAsyncContextManager[Device]: ...

    async def check_overlay(self, overlay: IPv6Network, interface: str) -> None:
        """Raises OverlayInUseError where another interface is in the overlay."""

    async def watch(self, device: Device, config: DeviceConfig, put: Put) -> None:
        """Tell of the network, the interface and the clock, for ever."""

    def way_out(self, remote: str) -> WayOut | None:
        """How packets to `remote` leave; None where there is no route."""

    async def is_answered(self, interface: str, server: IPv6Address) -> bool:
        """See `echo_probe`."""

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        """See `echo_probe`."""


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
                f"the interface {holder} has an address in the overlay {overlay} already, and two servers of one overlay "
                "cannot be told apart: leave that link, or use another network namespace"
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
                await anyio.sleep_forever()

    def way_out(self, remote: str) -> WayOut | None:
        return way_out(remote)

    async def is_answered(self, interface: str, server: IPv6Address) -> bool:
        return await is_answered(interface, server, self._namespace)

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        return await large_packets_pass(interface, server, self._namespace)
