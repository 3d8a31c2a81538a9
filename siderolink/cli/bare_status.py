"""A bare interface, as the control socket shows it: its peers, and what it dropped and why."""

from collections.abc import AsyncIterator

from siderolink.cli.control import peer_message
from siderolink.common.errors import SideroLinkError
from siderolink.common.pb.siderolink.control import Event, StatusResponse
from siderolink.common.wireguard.userspace import UserspaceDevice

__all__ = ["InterfaceSource"]


class InterfaceSource:
    """The status that `siderolink status` shows."""

    def __init__(self, device: UserspaceDevice) -> None:
        self._device = device

    async def status(self) -> StatusResponse:
        device = self._device
        has_key = device.report().private_key is not None
        return StatusResponse(
            role="interface",
            state="up" if device.is_passing else "down",
            interface=device.name,
            device_kind=device.kind,
            transport="udp",
            public_key=str(device.public_key) if has_key else "",
            listen_port=device.listen_port or 0,
            peers=[peer_message(peer) for peer in await device.peers()],
            drops=device.drops(),
        )

    def events(self) -> AsyncIterator[Event]:
        raise SideroLinkError("a bare interface has no event stream; set LOG_LEVEL=verbose to log events")
