"""The list of machines for programs that keep a copy: all machines once, then changes with each poll."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from anyio.lowlevel import checkpoint

from siderolink.common.parted_dict import PartedDict
from siderolink.common.tasks import in_parts
from siderolink.server.admin.hostnames import Hostnames
from siderolink.server.admin.machines import MachineAdministration, MachineStatus

MAX_FOLLOWERS: Final = 16
"""Maximum programs; for each one, the state sent of every machine is kept."""
_AT_ONCE: Final = 50
"""Machines compared before other tasks run, and links in one part."""
_WHOLE: Final = 20
"""Whole machines in one part; they take long to encode."""

Row = tuple[int, str]
Link = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowedPart:
    """A part of the result of one poll."""

    machines: list[MachineStatus] = field(default_factory=list)
    """New machines, and those whose rows or hostnames changed."""
    links: list[MachineStatus] = field(default_factory=list)
    """Other machines, whose links changed."""
    gone: list[str] = field(default_factory=list)
    is_last: bool = False


class _Sent(NamedTuple):
    """The state of one machine as last sent."""

    machine_id: str
    poll: int
    """The last poll that found the machine."""
    row: Row
    link: Link


class Follower:
    """The state that was sent to one program."""

    def __init__(self, machines: MachineAdministration, hostnames: Hostnames) -> None:
        self._machines = machines
        self._hostnames = hostnames
        self._sent: PartedDict[str, _Sent] = PartedDict()
        self._poll = 0

    async def changes(self) -> AsyncIterator[FollowedPart]:
        """The changes since the last poll, in parts. Yields to other tasks."""
        self._poll += 1
        machines: list[MachineStatus] = []
        links: list[MachineStatus] = []
        async for part in self._parts():
            for status in part:
                machine_id = status.machine.id
                now = self._state(status)
                before = self._sent.get(machine_id)
                if before is None or before.row != now.row:
                    machines.append(status)
                elif before.link != now.link:
                    links.append(status)
                self._sent[machine_id] = now
            for whole in in_parts(machines, _WHOLE):
                yield FollowedPart(machines=whole)
            if len(links) >= _AT_ONCE:
                yield FollowedPart(links=links[:_AT_ONCE])
                links = links[_AT_ONCE:]
            machines = []
            await checkpoint()
        for states in self._sent.parts():
            gone = [state.machine_id for state in states if state.poll != self._poll]
            for machine_id in gone:
                del self._sent[machine_id]
            if gone:
                yield FollowedPart(gone=gone)
            await checkpoint()
        yield FollowedPart(links=links, is_last=True)

    async def _parts(self) -> AsyncIterator[list[MachineStatus]]:
        async for found in self._machines.walk():
            for part in in_parts(found, _AT_ONCE):
                yield part

    def _state(self, status: MachineStatus) -> "_Sent":
        """The compared values of a machine. Times are omitted: whatever changes them also changes the counters."""
        machine, peer = status.machine, status.peer
        link: Link = (status.state, *status.limits_biting)
        if peer is not None:
            link += (peer.path, peer.received_bytes, peer.sent_bytes)
        return _Sent(machine.id, self._poll, (machine.revision, self._hostnames.of(machine.id)), link)


class Followers:
    """Limits the number of programs that follow."""

    def __init__(self, machines: MachineAdministration, hostnames: Hostnames) -> None:
        self._machines = machines
        self._hostnames = hostnames
        self._count = 0

    @contextmanager
    def register(self) -> Iterator[Follower | None]:
        """Register a follower; yields None if the limit is reached."""
        if self._count >= MAX_FOLLOWERS:
            yield None
            return
        self._count += 1
        try:
            yield Follower(self._machines, self._hostnames)
        finally:
            self._count -= 1
