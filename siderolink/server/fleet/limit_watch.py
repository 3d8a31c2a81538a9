"""Detects which limits of single machines drop something, by polling the drop counts, and publishes the begin and end of it.

Drops are counted by the device (bandwidth) and by the receivers of reports. This module adds up the differences, so a count
never falls while its machine is known, even if the device recreates the peer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from anyio.lowlevel import checkpoint

from siderolink.common.parted_dict import PartedDict
from siderolink.common.queues import Broadcast, Overflow
from siderolink.common.tasks import in_parts
from siderolink.common.wireguard.device import BANDWIDTH_DROPS, Device
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub, LimitOver, LimitReached
from siderolink.server.fleet.directory import Directory
from siderolink.server.store import ChangesLost, Machine

POLL_SECONDS: Final = 5.0
QUIET_SECONDS: Final = 60.0
"""A limit is over after this time without drops. So a machine has at most two history entries per minute and limit."""

_AT_ONCE: Final = 256
"""Machines looked at before other tasks run."""
LimitDrops = Mapping[str, Mapping[str, int]]
"""By machine id and limit name."""


@dataclass(slots=True)
class _Active:
    """A limit in effect."""

    since: float
    last_at: float
    dropped: int


@dataclass(slots=True)
class _Watched:
    """One machine that a limit has ever affected."""

    machine_id: str
    seen: dict[str, int] = field(default_factory=dict)
    """The counts of the last poll."""
    dropped: Counter[str] = field(default_factory=Counter)
    active_limits: dict[str, _Active] = field(default_factory=dict)


@dataclass(slots=True)
class LimitTotals:
    """Totals of the limits of all machines."""

    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    """Drops by machine id and limit name; only machines with drops."""
    limited_by: Counter[str] = field(default_factory=Counter)
    """The number of machines for which each limit is active."""
    limited_machines: int = 0
    """The number of machines for which any limit is active."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsChanged:
    """A limit of the machine began or ceased to drop something."""

    machine: Machine


class LimitWatch:
    """Watches the limits of single machines. Limits have the names of their drops (docs/drops.md)."""

    def __init__(self, device: Device, directory: Directory, events: EventHub, clock: Clock) -> None:
        self._device = device
        self._directory = directory
        self._events = events
        self._clock = clock
        self._watched: PartedDict[str, _Watched] = PartedDict()
        self.changes: Broadcast[LimitsChanged | ChangesLost] = Broadcast(
            lost=lambda _: ChangesLost(), overflow=Overflow.DROP_ALL
        )
        """Machines whose active limits changed since the last poll."""
        self.report_drops: Callable[[], Iterable[LimitDrops]] = tuple
        """Drops of machines' reports by limits, since each machine became known; in parts."""

    async def run(self) -> None:
        """Poll every few seconds, until cancelled."""
        while True:
            await self.poll()
            await self._clock.sleep(POLL_SECONDS)

    async def poll(self) -> None:
        """Compare the counts with those of the last poll."""
        found = await self._count()
        now = self._clock.monotonic()
        for part in self._watched.parts():
            for watched in part:
                link = self._directory.get(watched.machine_id)
                if link is None:
                    self._watched.pop(watched.machine_id, None)
                else:
                    self._compare(link.machine, watched, found.get(watched.machine_id, {}), now)
            await checkpoint()

    async def _count(self) -> dict[str, dict[str, int]]:
        """The present counts by machine id and limit; the machines are watched from now on."""
        found: dict[str, dict[str, int]] = {}
        for drops in self.report_drops():
            for machine_id, reports in drops.items():
                self._counts_of(machine_id, found).update(reports)
            await checkpoint()
        for part in in_parts((await self._device.limit_drops()).items(), _AT_ONCE):
            for key, packets in part:
                link = self._directory.by_key(key)
                if link is not None and link.claim is None:
                    self._counts_of(link.machine.id, found).update(zip(BANDWIDTH_DROPS, packets, strict=True))
            await checkpoint()
        return found

    def _counts_of(self, machine_id: str, found: dict[str, dict[str, int]]) -> dict[str, int]:
        if machine_id not in self._watched:
            self._watched[machine_id] = _Watched(machine_id)
        return found.setdefault(machine_id, {})

    def _compare(self, machine: Machine, watched: _Watched, found: Mapping[str, int], now: float) -> None:
        active_before = set(watched.active_limits)
        for limit, count in found.items():
            before = watched.seen.get(limit, 0)
            more = count - before if count >= before else count  # the device recreated the peer
            if more:
                watched.dropped[limit] += more
                active = watched.active_limits.get(limit)
                if active is None:
                    active = watched.active_limits[limit] = _Active(now, now, 0)
                    self._events.publish(LimitReached(machine=machine, limit=limit))
                active.last_at, active.dropped = now, active.dropped + more
        watched.seen = dict(found)
        for limit, active in list(watched.active_limits.items()):
            if now - active.last_at >= QUIET_SECONDS:
                del watched.active_limits[limit]
                self._events.publish(
                    LimitOver(machine=machine, limit=limit, dropped=active.dropped, seconds=active.last_at - active.since)
                )

        if active_before != watched.active_limits.keys():
            self.changes.publish(LimitsChanged(machine=machine))

    # --- queries

    def dropped(self, machine_id: str) -> dict[str, int]:
        """Drops by the machine's limits at this server, by limit name, as of the last poll."""
        watched = self._watched.get(machine_id)
        return {} if watched is None else dict(watched.dropped)

    def active(self, machine_id: str) -> list[str]:
        """The names of the machine's active limits."""
        watched = self._watched.get(machine_id)
        return [] if watched is None else sorted(watched.active_limits)

    async def limited(self) -> set[str]:
        """The ids of the machines with any active limit. Yields to other tasks."""
        found: set[str] = set()
        for part in self._watched.parts():
            found.update(watched.machine_id for watched in part if watched.active_limits)
            await checkpoint()
        return found

    async def totals(self) -> LimitTotals:
        """The current totals. Yields to other tasks."""
        found = LimitTotals()
        for part in self._watched.parts():
            for watched in part:
                if watched.dropped:
                    found.dropped[watched.machine_id] = dict(watched.dropped)
                found.limited_by.update(watched.active_limits.keys())
                found.limited_machines += bool(watched.active_limits)
            await checkpoint()
        return found
