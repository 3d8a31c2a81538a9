"""The host's services for a link: a device, notice of network, interface and clock changes, and probes."""

from contextlib import AbstractAsyncContextManager, ExitStack, closing, suppress
from functools import partial
from ipaddress import IPv6Address, IPv6Interface, IPv6Network
from typing import Protocol

import anyio

from siderolink.client.link.interface_guard import InterfaceGuard, overlay_holder
from siderolink.client.link.probes import ROUND_SECONDS, HandshakeTrial, is_answered, large_packets_pass, try_handshake
from siderolink.client.link.signals import ClockJumped, NetworkChanged, Put, Repaired, ServerLeaves
from siderolink.common.addressing import server_address
from siderolink.common.clock_watch import ClockWatch
from siderolink.common.errors import OverlayInUseError, SideroLinkError
from siderolink.common.goodbye import Goodbye, receive_move_requests, say_goodbye
from siderolink.common.netlink import NetworkChange, NetworkWatch, OutgoingRoute, route_to
from siderolink.common.tasks import background_tasks, keep_running
from siderolink.common.transport.choice import Route
from siderolink.common.wireguard.device import (
    Device,
    DeviceConfig,
    DeviceKind,
    InterfaceLost,
    OnDeviceEvent,
)
from siderolink.common.wireguard.opening import open_device


class Host(Protocol):
    """The host's services for a link, replaced in tests and simulations."""

    def open_device(
        self, kind: DeviceKind, config: DeviceConfig, on_event: OnDeviceEvent
    ) -> AbstractAsyncContextManager[Device]: ...

    async def check_overlay(self, overlay: IPv6Network, interface: str) -> None:
        """Raises OverlayInUseError if another interface has an address in the overlay."""

    async def watch(self, device: Device, config: DeviceConfig, put: Put) -> None:
        """Report network, interface and clock changes until cancelled."""

    def way_out(self, remote: str) -> OutgoingRoute | None:
        """How packets to `remote` leave; None if there is no route."""

    async def is_answered(self, interface: str, server: IPv6Address, wait: float = ROUND_SECONDS) -> bool:
        """See `probes`."""

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        """See `probes`."""

    async def try_handshake(self, trial: HandshakeTrial, route: Route) -> str | None:
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
            guard = InterfaceGuard(config)
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
                    keep_running, "hearing of a server that leaves", partial(self._follow_move_requests, device, config, put)
                )
                await anyio.sleep_forever()

    async def _follow_move_requests(self, device: Device, config: DeviceConfig, put: Put) -> None:
        for address in config.addresses[:1]:
            if isinstance(address, IPv6Interface):
                with suppress(SideroLinkError):  # the port is in use; the link works without it
                    await receive_move_requests(
                        lambda key: put(ServerLeaves(key)),
                        address=address.ip,
                        server=server_address(address.network),
                        interface=device.name,
                        namespace=self._namespace,
                    )

    def way_out(self, remote: str) -> OutgoingRoute | None:
        return route_to(remote)

    async def is_answered(self, interface: str, server: IPv6Address, wait: float = ROUND_SECONDS) -> bool:
        return await is_answered(interface, server, self._namespace, wait)

    async def large_packets_pass(self, interface: str, server: IPv6Address) -> bool | None:
        return await large_packets_pass(interface, server, self._namespace)

    async def try_handshake(self, trial: HandshakeTrial, route: Route) -> str | None:
        return await try_handshake(trial, route)

    async def say_goodbye(self, device: Device, source: IPv6Address, server: IPv6Address) -> None:
        goodbye = Goodbye(public_key=device.public_key)
        await say_goodbye(goodbye, source=source, server=server, interface=device.name, namespace=self._namespace)
