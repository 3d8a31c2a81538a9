"""Which limits bite at which machines: looked at every few seconds, told when it begins and when it is over.

What a limit drops is counted where it does: by the device (bandwidth) and by the reports' intake. This adds up the differences,
so that a count never falls while its machine is known, even if the device makes the peer anew.
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
class _Bite:
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
    bites: dict[str, _Bite] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsChanged:
    """A limit of the machine began to drop something, or is over."""

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
        """Machines of which other limits bite than at the last poll."""
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
        biting_before = set(watched.bites)
        for limit, count in found.items():
            before = watched.seen.get(limit, 0)
            more = count - before if count >= before else count  # the device made the peer anew
            if more:
                watched.dropped[limit] += more
                bite = watched.bites.get(limit)
                if bite is None:
                    bite = watched.bites[limit] = _Bite(now, now, 0)
                    self._events.publish(LimitReached(machine=machine, limit=limit))
                bite.last_at, bite.dropped = now, bite.dropped + more
        watched.seen = dict(found)
        for limit, bite in list(watched.bites.items()):
            if now - bite.last_at >= QUIET_SECONDS:
                del watched.bites[limit]
                self._events.publish(
                    LimitOver(machine=machine, limit=limit, dropped=bite.dropped, seconds=bite.last_at - bite.since)
                )

        if biting_before != watched.bites.keys():
            self.changes.publish(LimitsChanged(machine=machine))

    # --- what is known

    def dropped(self, machine_id: str) -> dict[str, int]:
        """Drops by the machine's limits at this server, by limit name, as of the last poll."""
        watched = self._watched.get(machine_id)
        return {} if watched is None else dict(watched.dropped)

    def all_biting(self) -> dict[str, list[str]]:
        """The names of the limits that bite now, by machine's id; of machines with any."""
        return {machine_id: sorted(watched.bites) for machine_id, watched in self._watched.items() if watched.bites}

    def all_dropped(self) -> dict[str, dict[str, int]]:
        """`dropped` of all machines that have any."""
        return {machine_id: dict(watched.dropped) for machine_id, watched in self._watched.items() if watched.dropped}

    def bitten(self) -> Counter[str]:
        """How many machines each limit bites now."""
        return Counter(limit for watched in self._watched.values() for limit in watched.bites)

    def bitten_machines(self) -> int:
        """How many machines any limit bites now."""
        return sum(bool(watched.bites) for watched in self._watched.values())
