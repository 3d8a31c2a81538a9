"""The history of machines: its entries, queries of it, and retention bounds."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice

from anyio.lowlevel import checkpoint

from siderolink.common.tasks import in_parts

NO_MACHINE = ""
"""The machine id of entries without a row, such as a refused join."""
_PART = 1000
_REMOVALS = 50
"""Entries removed in one go: each costs as much as its machine, or all refusals together, have entries."""


class HistoryKind(StrEnum):
    """The kind of event."""

    JOINED = "joined"
    """A Provision call created a link."""
    UP = "up"
    """The first handshake after a join, or after the link was down."""
    DOWN = "down"
    """The detail has the reason."""
    LEFT = "left"
    """The machine was forgotten; the detail has the reason."""
    REFUSED = "refused"
    """A Provision call that named the machine's UUID was refused."""
    TAKEN_OVER = "taken over"
    """The row went to a machine with another key."""
    CLAIM_REFUSED = "claim refused"
    """Another key's claim was proved too late."""
    BOUND = "bound"
    """A unique token was bound to the row."""
    ADMISSION = "admission"
    """The machine was accepted, denied, or moved to another UUID."""
    ADDRESS = "address"
    """A handshake arrived from another address than the one before."""
    TRANSPORT = "transport"
    """A handshake arrived over another transport than the one before."""
    VERSION = "version"
    """It joined with another version than the last time."""
    LIMITED = "limited"
    """A rate limit began to drop the machine's traffic; the detail names the limit."""
    LIMIT_OVER = "limit over"
    """The limit has dropped nothing for a minute; the detail has the total before that."""
    LOST = "lost"
    """More events than could be recorded; the detail has their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One event in a machine's history."""

    seq: int = 0
    """Increases with each entry of a store; 0 before it is stored."""
    at: float
    """Unix time in seconds, by the store's clock."""
    machine_id: str
    """NO_MACHINE if there is no row."""
    node_uuid: str
    """As the machine reported it; empty if it reported none."""
    kind: HistoryKind
    detail: str = ""
    """One line for humans."""
    transport: str = ""
    """``udp`` or ``tunnel``; empty if irrelevant, like the following ones."""
    source: str = ""
    """The machine's source address."""
    version: str = ""
    """The machine's Talos version."""
    join_token: str = ""
    """The name of the join token, and the first digits of the presented token's digest: ``spring (0123456789ab)``."""
    count: int = 1
    """Number of occurrences, starting at `at`, that were combined into this entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryQuery:
    """Selects entries, newest first; with `after_seq` oldest first."""

    machine_id: str | None = None
    """Entries of one row. Together with `node_uuid`: of either."""
    node_uuid: str | None = None
    """Entries recorded under this UUID."""
    kinds: Sequence[HistoryKind] = ()
    """Empty selects all kinds."""
    since: float | None = None
    until: float | None = None
    """Only entries before this time."""
    before_seq: int | None = None
    """Only entries before this one; for the next page."""
    after_seq: int | None = None
    """Only entries after this one."""
    limit: int = 1000

    def matches(self, entry: HistoryEntry, seq: int) -> bool:
        """Whether the query selects the entry, stored under this number; ignores `limit`."""
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
    """Retention bounds of the history."""

    since: float
    """Older entries are deleted."""
    per_machine: int
    """Maximum per machine; the newest are kept. Entries without a row share a bound ten times as large."""
    total: int
    """Maximum for all machines together."""

    def of(self, machine_id: str) -> int:
        """The maximum number of entries for this machine id."""
        return self.per_machine if machine_id != NO_MACHINE else 10 * self.per_machine


class MemoryHistory:
    """The history of an in-memory store."""

    def __init__(self) -> None:
        self._entries: dict[int, HistoryEntry] = {}
        """Entries by number. The number is put into an entry only when it is read."""
        self._of_machine: dict[str, tuple[int, ...]] = {}  # tuples, because most machines have few entries
        self._of_uuid: dict[str, tuple[int, ...]] = {}
        self._last = 0

    def add(self, entries: Sequence[HistoryEntry]) -> None:
        for entry in entries:
            self._last += 1
            self._entries[self._last] = entry
            alone = (self._last,)  # both indexes share it as long as a machine has one entry
            for index, key in ((self._of_machine, entry.machine_id), (self._of_uuid, entry.node_uuid)):
                index[key] = index[key] + alone if key in index else alone

    async def find(self, query: HistoryQuery) -> list[HistoryEntry]:
        """See `Store`. Yields to other tasks."""
        found: list[HistoryEntry] = []
        for part in in_parts(self._candidates(query), _PART):
            for seq in part:
                entry = self._entries.get(seq)
                if entry is not None and query.matches(entry, seq):
                    found.append(replace(entry, seq=seq))
                    if len(found) >= query.limit:
                        return found
            await checkpoint()
        return found

    async def delete(self, query: HistoryQuery) -> int:
        found = await self.find(replace(query, limit=sys.maxsize))
        return await self._remove([entry.seq for entry in found])

    async def prune(self, bounds: HistoryBounds) -> int:
        """Delete entries that are too old or too many. Yields to other tasks."""
        count = await self.delete(HistoryQuery(until=bounds.since))
        for part in in_parts(self._of_machine, _PART):
            for machine_id in part:
                seqs = self._of_machine.get(machine_id, ())
                count += await self._remove(list(islice(seqs, max(0, len(seqs) - bounds.of(machine_id)))))
            await checkpoint()
        return count + await self._remove(list(islice(self._entries, max(0, len(self._entries) - bounds.total))))

    def _candidates(self, query: HistoryQuery) -> list[int]:
        """Candidates, in the query's order."""
        is_oldest_first = query.after_seq is not None
        if query.machine_id is None and query.node_uuid is None:
            return list(self._entries if is_oldest_first else reversed(self._entries))
        of_machine = self._of_machine.get(query.machine_id, ()) if query.machine_id is not None else ()
        of_uuid = self._of_uuid.get(query.node_uuid, ()) if query.node_uuid is not None else ()
        return sorted({*of_machine, *of_uuid}, reverse=not is_oldest_first)

    async def _remove(self, seqs: Sequence[int]) -> int:
        count = 0
        for part in in_parts(seqs, _REMOVALS):
            count += sum(map(self._drop, part))
            await checkpoint()
        return count

    def _drop(self, seq: int) -> bool:
        """Delete an entry if it still exists."""
        entry = self._entries.pop(seq, None)
        if entry is None:
            return False
        for index, key in ((self._of_machine, entry.machine_id), (self._of_uuid, entry.node_uuid)):
            known = index.pop(key)
            at = known.index(seq)
            if rest := known[:at] + known[at + 1 :]:
                index[key] = rest
        return True
