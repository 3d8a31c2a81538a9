"""What happened to machines: the entries of the history, what is asked of it, and how much of it is kept."""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice

from anyio.lowlevel import checkpoint

from siderolink.common.tasks import in_parts

NO_MACHINE = ""
"""The machine id of an entry that is about no row, such as a refused join."""
_PART = 1000


class HistoryKind(StrEnum):
    """What happened."""

    JOINED = "joined"
    """A Provision call made a link."""
    UP = "up"
    """The first handshake since the join, or since the link was down."""
    DOWN = "down"
    """The detail says why."""
    LEFT = "left"
    """The machine was forgotten; the detail says why."""
    REFUSED = "refused"
    """A Provision call that named the machine's UUID was refused."""
    TAKEN_OVER = "taken over"
    """The row went to another key."""
    CLAIM_REFUSED = "claim refused"
    """Another key's claim came too late."""
    BOUND = "bound"
    """A unique token was bound to the row."""
    ADMISSION = "admission"
    """It was accepted, denied, or moved to another UUID."""
    ADDRESS = "address"
    """A handshake came from another address than the one before."""
    TRANSPORT = "transport"
    """A handshake came by another transport than the one before."""
    VERSION = "version"
    """It joined with another version than before."""
    LIMITED = "limited"
    """One of its limits began to drop what it sends or is sent; the detail names it."""
    LIMIT_OVER = "limit over"
    """That limit has dropped nothing for a minute; the detail says how much it dropped before."""
    LOST = "lost"
    """More happened than could be noted; the detail says how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One thing that happened."""

    seq: int = 0
    """Rises with each entry of a store; 0 before it is stored."""
    at: float
    """Unix time in seconds, by the store's clock."""
    machine_id: str
    """NO_MACHINE where it is about no row."""
    node_uuid: str
    """As the machine said; empty where it said none."""
    kind: HistoryKind
    detail: str = ""
    """A line for people."""
    transport: str = ""
    """``udp`` or ``tunnel``; empty where it does not matter, as the following ones."""
    source: str = ""
    """The address that it came from."""
    version: str = ""
    """The machine's Talos version."""
    join_token: str = ""
    """The name of the join token, and the first digits of the digest of what was presented: ``spring (0123456789ab)``."""
    count: int = 1
    """How often it happened from `at` on, within the seconds that are noted together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryQuery:
    """Which entries are wanted; the newest come first, but with `after_seq` the oldest."""

    machine_id: str | None = None
    """Those of one row. With `node_uuid`: of either."""
    node_uuid: str | None = None
    """Those that were noted under this UUID."""
    kinds: Sequence[HistoryKind] = ()
    """Empty: all."""
    since: float | None = None
    until: float | None = None
    """Before this time."""
    before_seq: int | None = None
    """For the next page: entries before this one."""
    after_seq: int | None = None
    """Entries after this one."""
    limit: int = 1000

    def takes(self, entry: HistoryEntry, seq: int) -> bool:
        """Whether the entry, stored under this number, is wanted; `limit` aside."""
        if self.machine_id is not None or self.node_uuid is not None:
            is_named = entry.machine_id == self.machine_id or entry.node_uuid == self.node_uuid
            if not is_named:
                return False
        return (
            (not self.kinds or entry.kind in self.kinds)
            and (self.since is None or entry.at >= self.since)
            and (self.until is None or entry.at < self.until)
            and (self.before_seq is None or seq < self.before_seq)
            and (self.after_seq is None or seq > self.after_seq)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryBounds:
    """How much of the history is kept."""

    since: float
    """Older entries go."""
    per_machine: int
    """How many of one machine, at most, the newest. Entries about no row are bounded together, by ten times as many."""
    total: int
    """How many of all machines."""

    def of(self, machine_id: str) -> int:
        """How many entries under this id are kept."""
        return self.per_machine if machine_id != NO_MACHINE else 10 * self.per_machine


class MemoryHistory:
    """The history of a store in memory."""

    def __init__(self) -> None:
        self._entries: dict[int, HistoryEntry] = {}
        """Entries by their numbers, which the entries themselves are given only when they are read."""
        self._of_machine: dict[str, array[int]] = {}
        self._of_uuid: dict[str, array[int]] = {}
        self._last = 0

    def add(self, entries: Sequence[HistoryEntry]) -> None:
        for entry in entries:
            self._last += 1
            self._entries[self._last] = entry
            for index, key in ((self._of_machine, entry.machine_id), (self._of_uuid, entry.node_uuid)):
                known = index.get(key)
                if known is None:
                    index[key] = array("Q", (self._last,))
                else:
                    known.append(self._last)

    async def find(self, query: HistoryQuery) -> list[HistoryEntry]:
        """Other tasks run meanwhile."""
        found: list[HistoryEntry] = []
        for part in in_parts(self._candidates(query), _PART):
            for seq in part:
                entry = self._entries.get(seq)
                if entry is not None and query.takes(entry, seq):
                    found.append(replace(entry, seq=seq))
                    if len(found) >= query.limit:
                        return found
            await checkpoint()
        return found

    async def delete(self, query: HistoryQuery) -> int:
        found = await self.find(replace(query, limit=sys.maxsize))
        return await self._remove([entry.seq for entry in found])

    async def prune(self, bounds: HistoryBounds) -> int:
        """Delete what is too old or too much; other tasks run meanwhile."""
        count = await self.delete(HistoryQuery(until=bounds.since))
        for part in in_parts(self._of_machine, _PART):
            for machine_id in part:
                seqs = self._of_machine.get(machine_id, ())
                count += await self._remove(list(islice(seqs, max(0, len(seqs) - bounds.of(machine_id)))))
            await checkpoint()
        return count + await self._remove(list(islice(self._entries, max(0, len(self._entries) - bounds.total))))

    def _candidates(self, query: HistoryQuery) -> list[int]:
        """In the order in which the query wants them."""
        is_oldest_first = query.after_seq is not None
        if query.machine_id is None and query.node_uuid is None:
            return list(self._entries if is_oldest_first else reversed(self._entries))
        of_machine = self._of_machine.get(query.machine_id, ()) if query.machine_id is not None else ()
        of_uuid = self._of_uuid.get(query.node_uuid, ()) if query.node_uuid is not None else ()
        return sorted({*of_machine, *of_uuid}, reverse=not is_oldest_first)

    async def _remove(self, seqs: Sequence[int]) -> int:
        count = 0
        for part in in_parts(seqs, _PART):
            count += sum(map(self._drop, part))
            await checkpoint()
        return count

    def _drop(self, seq: int) -> bool:
        """Delete an entry, if it is still there."""
        entry = self._entries.pop(seq, None)
        if entry is None:
            return False
        for index, key in ((self._of_machine, entry.machine_id), (self._of_uuid, entry.node_uuid)):
            index[key].remove(seq)
            if not index[key]:
                del index[key]
        return True
