"""A WireGuard interface by itself, for `wg` and `ip` to configure like any other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from siderolink.common.wireguard.device import DeviceConfig, DeviceEvent, InterfaceLost, OnDeviceEvent
from siderolink.common.wireguard.tun_device import TunDevice
from siderolink.common.wireguard.uapi.removal import watch_removal
from siderolink.common.wireguard.uapi.server import serve_uapi

BARE_MTU = 1420
"""What fits an Ethernet of 1,500 bytes with IPv6 outside."""


@asynccontextmanager
async def open_interface(name: str, on_device_event: OnDeviceEvent = lambda event: None) -> AsyncIterator[asyncio.Event]:
    """Make the interface, down and without key or address; leaving the context removes it and its socket.

    The event is set when somebody deletes the interface or the socket. Raises DeviceUnavailableError or InterfaceInUseError.
    """
    lost = asyncio.Event()

    def on_event(event: DeviceEvent) -> None:
        if isinstance(event, InterfaceLost):
            lost.set()
        on_device_event(event)

    config = DeviceConfig(name=name, private_key=None, mtu=BARE_MTU, up=False, is_shown=False)
    async with TunDevice.open(config, on_event) as device, serve_uapi(name, device.report, device.apply) as path:
        with watch_removal(path, lost.set):
            yield lost
