"""The service for the other servers: when this one last heard a machine, and the state of its link."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Final

from siderolink.common.pb.siderolink.peers import v1 as pb
from siderolink.common.tasks import in_parts
from siderolink.common.wireguard.device import Device
from siderolink.server.admin.machines import MachineStatus, statuses
from siderolink.server.clock import Clock
from siderolink.server.fleet.directory import Directory, MachineLink
from siderolink.server.fleet.limit_watch import LimitWatch

_AT_ONCE: Final = 200


class PeerService(pb.PeerServiceBase):
    """See peers.proto."""

    def __init__(
        self,
        directory: Directory,
        device: Device,
        clock: Clock,
        heard_at: Callable[[str], Awaitable[float]],
        limits: LimitWatch,
    ) -> None:
        """`heard_at` tells when this server last heard a machine, by the store's clock; 0.0 if it never did."""
        self._heard_at = heard_at
        self._directory = directory
        self._device = device
        self._clock = clock
        self._limits = limits

    async def last_heard(self, message: pb.LastHeardRequest) -> pb.LastHeardResponse:
        return pb.LastHeardResponse(heard_at=await self._heard_at(message.machine_id))

    async def link_states(self, message: pb.LinkStatesRequest) -> AsyncIterator[pb.LinkStatesResponse]:
        for links in self._wanted(message.machine_ids):
            known = await statuses(self._device, links, self._limits)
            found = [one for status in known if (one := self._message(status)) is not None]
            if found:
                yield pb.LinkStatesResponse(links=found)

    def _wanted(self, machine_ids: Sequence[str]) -> Iterator[list[MachineLink]]:
        if not machine_ids:
            yield from self._directory.parts()
        for part in in_parts(machine_ids, _AT_ONCE):
            yield [link for machine_id in part if (link := self._directory.get(machine_id)) is not None]

    def _message(self, status: MachineStatus) -> pb.LinkStatus | None:
        """None for a machine that this server has not heard."""
        peer, now = status.peer, self._clock.host_time()
        silence = None if peer is None else peer.silence(now)
        if peer is None or silence is None:
            return None
        return pb.LinkStatus(
            machine_id=status.machine.id,
            state=str(status.state),
            public_key=bytes(peer.public_key),
            path=peer.path or "",
            silent_for=silence,
            handshake_age=None if peer.last_handshake is None else max(0.0, now - peer.last_handshake),
            received_bytes=peer.received_bytes,
            sent_bytes=peer.sent_bytes,
            limits_biting=list(status.limits_biting),
        )
