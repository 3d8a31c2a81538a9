"""The built-in WireGuard without an interface: packets come from a call and go to a call. It needs no privilege."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from siderolink.common.wireguard.device import DeviceConfig, OnDeviceEvent
from siderolink.common.wireguard.packets.headers import PLAIN_VNET_HEADER, VNET_SIZE
from siderolink.common.wireguard.userspace import UserspaceDevice

OnPacket = Callable[[bytes], None]
"""Called with one inner IP packet, on the event loop; must be quick and must not raise."""


class CallableInterface:
    """Passes each packet to a callable."""

    tso = False
    uso = False
    frame = memoryview(b"")
    descriptor = -1

    def __init__(self, on_packet: OnPacket) -> None:
        self._on_packet = on_packet

    def read(self) -> None:
        """Nothing is ever waiting: packets are sent by `PacketDevice.send`."""

    def write(self, buffers: Sequence[bytes | bytearray | memoryview]) -> bool:
        self._on_packet(b"".join(buffers)[VNET_SIZE:])
        return True


class PacketDevice(UserspaceDevice):
    """Created by `open_packet_device`."""

    def send(self, packet: bytes) -> None:
        """Send one IP packet to the peer that has its destination; dropped and counted if there is none."""
        self.plane.send_packet(PLAIN_VNET_HEADER + packet)


@asynccontextmanager
async def open_packet_device(
    config: DeviceConfig, on_packet: OnPacket, on_event: OnDeviceEvent = lambda event: None
) -> AsyncIterator[PacketDevice]:
    """A WireGuard peer in this process only; `config.name` is a label, and its addresses matter only to isolation.

    Raises AddressInUseError.
    """
    device = PacketDevice(config, CallableInterface(on_packet), on_event)
    try:
        device.start()
        yield device
    finally:
        device.close()
