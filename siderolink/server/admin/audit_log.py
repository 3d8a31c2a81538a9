"""The audit: listing, following, export and pruning, and sampled records of failed logins."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Final

from siderolink.common.newest_dict import NewestDict
from siderolink.common.tasks import uninterrupted
from siderolink.common.token_bucket import TokenBucket
from siderolink.server.admin.lists import Page, page_size, seq_of
from siderolink.server.admin.names import require
from siderolink.server.clock import Clock, RetentionTime
from siderolink.server.store import Actor, AuditAdded, AuditEntry, AuditQuery, ChangesLost, Role, Store
from siderolink.server.store.audit import EMBEDDER

EVERYTHING: Final = AuditQuery()
_AT_ONCE: Final = 500
_PRUNE_EVERY: Final = 3600.0
_SAMPLE_EVERY: Final = 60.0
"""Minimum seconds between two entries of failed logins from one source."""
_MAX_SOURCES: Final = 1024
_SAMPLES_PER_MINUTE: Final = 10


@dataclass(slots=True)
class _Failures:
    count: int
    written_at: float


class AuditLog:
    """The record of changes and their authors. Reading needs the role admin; methods raise ForbiddenError without it."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._retention_time = RetentionTime("audit entries", clock.time, clock.monotonic)
        self._failures: NewestDict[str, _Failures] = NewestDict(_MAX_SOURCES)
        self._samples = TokenBucket(_SAMPLES_PER_MINUTE / 60, _SAMPLES_PER_MINUTE)

    # --- reading

    async def page(self, query: AuditQuery = EVERYTHING, page_token: str = "", *, actor: Actor = EMBEDDER) -> Page[AuditEntry]:
        """One page of entries, newest first. The query's limit is the page size (0: default). Raises ConfigurationError."""
        require(actor, Role.ADMIN)
        size = page_size(query.limit)
        before = query.before_seq
        if page_token:
            before = seq_of(page_token)
        entries = await self._store.audit_entries(replace(query, newest_first=True, before_seq=before, limit=size + 1))
        part = entries[:size]
        return Page(items=part, next_page_token=str(part[-1].seq) if len(entries) > size else "", total=len(part))

    async def follow(self, query: AuditQuery = EVERYTHING, *, actor: Actor = EMBEDDER) -> AsyncIterator[AuditEntry]:
        """Follow the audit: entries from now on, or after the query's `after_seq`; oldest first."""
        require(actor, Role.ADMIN)
        async with self._store.changes(lambda change: isinstance(change, AuditAdded)) as changes:
            last = query.after_seq
            if last is None:
                newest = await self._store.audit_entries(AuditQuery(limit=1))
                last = newest[0].seq if newest else 0
            async for entry in self._after(query, last):
                last = max(last, entry.seq)
                yield entry
            known = last
            async for change in changes:
                if isinstance(change, AuditAdded):
                    # with several servers, lower numbers may arrive later
                    if change.entry.seq > known and query.matches(change.entry):
                        last = max(last, change.entry.seq)
                        yield change.entry
                elif isinstance(change, ChangesLost):
                    async for entry in self._after(query, last):
                        last = max(last, entry.seq)
                        yield entry
                    known = last

    async def export(self, query: AuditQuery = EVERYTHING, *, actor: Actor = EMBEDDER) -> AsyncIterator[AuditEntry]:
        """All entries that the query selects, oldest first."""
        require(actor, Role.ADMIN)
        async for entry in self._after(query, query.after_seq or 0):
            yield entry

    async def _after(self, query: AuditQuery, last: int) -> AsyncIterator[AuditEntry]:
        while True:
            wanted = replace(query, newest_first=False, after_seq=last, limit=_AT_ONCE)
            entries = await self._store.audit_entries(wanted)
            for entry in entries:
                yield entry
            if len(entries) < _AT_ONCE:
                return
            last = entries[-1].seq

    # --- writing

    @uninterrupted
    async def add(self, entry: AuditEntry) -> None:
        """Record an action that changes no row, in its own transaction."""
        await self._store.transact(lambda transaction: transaction.audit(entry))

    async def record(self, actor: Actor, action: str, object_kind: str) -> None:
        """Like `add`, for an object of which there is only one."""
        await self.add(AuditEntry(at=self._clock.time(), actor=actor, action=action, object_kind=object_kind))

    async def login_failed(self, source: str, reason: str) -> None:
        """Record a failed login: once a minute per source, with a count, and a few per minute in total."""
        now = time.monotonic()
        known = self._failures.get(source) or _Failures(0, -_SAMPLE_EVERY)
        self._failures.put(source, known)
        known.count += 1
        if now - known.written_at < _SAMPLE_EVERY or not self._samples.take(1):
            return
        count, known.count, known.written_at = known.count, 0, now
        await self.add(
            AuditEntry(
                at=self._clock.time(),
                actor=Actor(name="unknown", source=source),
                action="login.failed",
                object_kind="api_key",
                after={"reason": reason, "attempts": count},
            )
        )

    async def keep(self, seconds: float) -> None:
        """Remove entries older than `seconds` periodically, until cancelled."""
        while True:
            await self.prune(seconds)
            await self._clock.sleep(_PRUNE_EVERY)

    async def prune(self, seconds: float) -> int:
        """Remove entries older than `seconds`, in parts; returns how many."""
        total, before = 0, self._retention_time() - seconds
        while (removed := await self._store.prune_audit(before, _AT_ONCE)) > 0:
            total += removed
        return total
