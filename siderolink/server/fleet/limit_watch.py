"""Detects which limits of single machines drop something, by polling the drop counts, and publishes the begin and end of it.

Drops are counted by the device (bandwidth) and by the receivers of reports. This module adds up the differences, so a count
never falls while its machine is known, even if the device recreates the peer.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from siderolink.common.queues import Broadcast, Overflow
from siderolink.common.wireguard.device import BANDWIDTH_DROPS, Device
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub, LimitOver, LimitReached
from siderolink.server.fleet.directory import Directory
from siderolink.server.store import ChangesLost, Machine

POLL_SECONDS: Final = 5.0
QUIET_SECONDS: Final = 60.0
"""A limit is over after this time without drops. So a machine has at most two history entries per minute and limit."""

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

    seen: dict[str, int] = field(default_factory=dict)
    """The counts of the last poll."""
    dropped: Counter[str] = field(default_factory=Counter)
    active_limits: dict[str, _Active] = field(default_factory=dict)


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
        self._watched: dict[str, _Watched] = {}
        self.changes: Broadcast[LimitsChanged | ChangesLost] = Broadcast(
            lost=lambda _: ChangesLost(), overflow=Overflow.DROP_ALL
        )
        """Machines whose active limits changed since the last poll."""
        self.report_drops: Callable[[], LimitDrops] = dict
        """Drops of machines' reports by limits, since each machine became known."""

    async def run(self) -> None:
        """Poll every few seconds, until cancelled."""
        while True:
            await self.poll()
            await self._clock.sleep(POLL_SECONDS)

    async def poll(self) -> None:
        """Compare the counts with those of the last poll."""
        found: dict[str, dict[str, int]] = {machine_id: dict(drops) for machine_id, drops in self.report_drops().items()}
        for key, (inbound, outbound) in (await self._device.limit_drops()).items():
            link = self._directory.by_key(key)
            if link is not None and link.claim is None:
                own = zip(BANDWIDTH_DROPS, (inbound, outbound), strict=True)
                found.setdefault(link.machine.id, {}).update(own)
        now = self._clock.monotonic()
        for machine_id in self._watched.keys() | found.keys():
            link = self._directory.get(machine_id)
            if link is None:
                self._watched.pop(machine_id, None)
            else:
                watched = self._watched.setdefault(machine_id, _Watched())
                self._compare(link.machine, watched, found.get(machine_id, {}), now)

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

    def all_active(self) -> dict[str, list[str]]:
        """The names of the active limits, by machine id; machines without any are omitted."""
        found = ((machine_id, sorted(watched.active_limits)) for machine_id, watched in self._watched.items())
        return {machine_id: names for machine_id, names in found if names}

    def all_dropped(self) -> dict[str, dict[str, int]]:
        """`dropped` for all machines that have any."""
        return {machine_id: dict(watched.dropped) for machine_id, watched in self._watched.items() if watched.dropped}

    def limited_by(self) -> Counter[str]:
        """The number of machines for which each limit is active."""
        return Counter(limit for watched in self._watched.values() for limit in watched.active_limits)

    def limited_machines(self) -> int:
        """The number of machines for which any limit is active."""
        return sum(bool(watched.active_limits) for watched in self._watched.values())
