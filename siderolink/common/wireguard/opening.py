"""Opens a device of either kind, or a bare interface that `wg` and `ip` configure."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from siderolink.common.errors import DeviceUnavailableError
from siderolink.common.wireguard.device import (
    Device,
    DeviceConfig,
    DeviceContext,
    DeviceEvent,
    DeviceKind,
    InterfaceLost,
    OnDeviceEvent,
)

if TYPE_CHECKING:
    from siderolink.common.wireguard.userspace import UserspaceDevice

__all__ = ["BareInterface", "open_device", "open_interface"]

BARE_MTU = 1420
"""The MTU that fits an Ethernet frame of 1,500 bytes with outer IPv6."""

_logger = logging.getLogger("siderolink")


def open_device(kind: DeviceKind, config: DeviceConfig, on_event: OnDeviceEvent) -> DeviceContext:
    """Create a device; leaving the context removes the interface and everything created with it.

    `auto` uses the kernel's WireGuard if it can create such an interface, else the built-in one over /dev/net/tun.
    Raises DeviceUnavailableError, InterfaceInUseError or AddressInUseError on entering.
    """
    if kind == "kernel":
        return _open_kernel(config, on_event)
    if kind == "userspace":
        return _open_userspace(config, on_event)
    return _open_either(config, on_event)


def _open_kernel(config: DeviceConfig, on_event: OnDeviceEvent) -> DeviceContext:
    from siderolink.common.wireguard.kernel.device import KernelDevice

    return KernelDevice.open(config, on_event)


@asynccontextmanager
async def _open_userspace(config: DeviceConfig, on_event: OnDeviceEvent) -> AsyncIterator[Device]:
    from siderolink.common.wireguard.kernel.interface import remove_leftovers
    from siderolink.common.wireguard.packets import row_functions_in_use
    from siderolink.common.wireguard.tun_device import TunDevice

    await remove_leftovers(config.name, config.namespace)
    _logger.info("%s is a userspace device: packets by %s", config.name, row_functions_in_use())
    async with TunDevice.open(config, on_event) as device:
        yield device


@asynccontextmanager
async def _open_either(config: DeviceConfig, on_event: OnDeviceEvent) -> AsyncIterator[Device]:
    async with AsyncExitStack() as stack:
        try:
            device = await stack.enter_async_context(_open_kernel(config, on_event))
        except DeviceUnavailableError as kernel_lacks:
            try:
                device = await stack.enter_async_context(_open_userspace(config, on_event))
            except DeviceUnavailableError as userspace_lacks:
                raise DeviceUnavailableError(
                    f"cannot create a WireGuard interface. Kernel: {kernel_lacks}. Userspace: {userspace_lacks}"
                ) from kernel_lacks
        yield device


@dataclass(frozen=True, slots=True)
class BareInterface:
    """A WireGuard interface that other programs configure."""

    device: "UserspaceDevice"
    lost: asyncio.Event
    """Set when another program deletes the interface or its socket."""


@asynccontextmanager
async def open_interface(name: str, on_device_event: OnDeviceEvent = lambda event: None) -> AsyncIterator[BareInterface]:
    """Create the interface, down and without key or address; leaving the context removes it and its socket.

    Raises DeviceUnavailableError or InterfaceInUseError.
    """
    from siderolink.common.wireguard.packets import row_functions_in_use
    from siderolink.common.wireguard.tun_device import TunDevice
    from siderolink.common.wireguard.uapi.server import serve_uapi, watch_removal

    _logger.info("%s is a userspace device: packets by %s", name, row_functions_in_use())
    lost = asyncio.Event()

    def on_event(event: DeviceEvent) -> None:
        if isinstance(event, InterfaceLost):
            lost.set()
        on_device_event(event)

    config = DeviceConfig(name=name, private_key=None, mtu=BARE_MTU, up=False, is_shown=False)
    async with TunDevice.open(config, on_event) as device, serve_uapi(name, device.report, device.apply) as path:
        with watch_removal(path, lost.set):
            yield BareInterface(device, lost)
