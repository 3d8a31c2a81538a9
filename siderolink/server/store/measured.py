"""A wrapper around a store that measures the duration and the failures of its transactions."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, TypeVar

from siderolink.common.errors import StoreError, StoreFullError, StoreReadOnlyError
from siderolink.common.histogram import Histogram
from siderolink.server.store.audit import AuditEntry, AuditQuery
from siderolink.server.store.base import Store, Work
from siderolink.server.store.feed import Change, Wanted
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryQuery
from siderolink.server.store.ownership import Ownership
from siderolink.server.store.rows import Ban, BanGrounds, Claim, Machine
from siderolink.server.store.sealing import Sealer
from siderolink.server.store.tokens import JoinToken

T = TypeVar("T")

LATENCY_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounters:
    """Transactions since the server was created. One whose work raised (such as a refusal) does not count as a failure."""

    seconds: float
    """Total duration, including the wait for the commit."""
    buckets: tuple[int, ...]
    """Transactions per latency bucket: at most each of LATENCY_BOUNDS and above the one before; the last is beyond all."""
    failures: int
    """Transactions that the store itself failed."""

    @property
    def count(self) -> int:
        return sum(self.buckets)


class MeasuredStore:
    """See `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._latencies = Histogram(LATENCY_BOUNDS)
        self._failures = 0
        self.refused_at: float | None = None
        """When the store last could not take changes because it was full or read-only, on the monotonic clock."""
        self.refusal = ""
        """Why."""

    @property
    def kind(self) -> str:
        """The kind of store: "memory", "sqlite", "postgres" or "other"."""
        return str(getattr(self._store, "kind", "other"))

    @property
    def is_shared(self) -> bool:
        """False for an embedder's store without this property."""
        return bool(getattr(self._store, "is_shared", False))

    def counters(self) -> StoreCounters:
        found = self._latencies
        return StoreCounters(seconds=found.total, buckets=tuple(found.counts), failures=self._failures)

    @property
    def sealer(self) -> Sealer:
        return self._store.sealer

    def time(self) -> float:
        return self._store.time()

    async def transact(self, work: Work[T]) -> T:
        return await self._measure(self._store.transact(work))

    async def transact_urgently(self, work: Work[T]) -> T:
        # an embedder's store may lack it
        transact: Callable[[Work[T]], Awaitable[T]] = getattr(self._store, "transact_urgently", self._store.transact)
        return await self._measure(transact(work))

    async def _measure(self, transaction: Awaitable[T]) -> T:
        began_at = time.perf_counter()
        try:
            return await transaction
        except StoreError as error:
            self._failures += 1
            if isinstance(error, StoreFullError | StoreReadOnlyError):
                self.refused_at, self.refusal = time.monotonic(), str(error)
            raise
        finally:
            self._latencies.add(time.perf_counter() - began_at)

    def machines(self) -> AsyncIterator[Machine]:
        return self._store.machines()

    def owners(self, server_id: str | None = None) -> AsyncIterator[Ownership]:
        return self._store.owners(server_id)

    async def bans(self) -> Mapping[Ban, BanGrounds]:
        return await self._store.bans()

    async def all_claims(self) -> Sequence[Claim]:
        return await self._store.all_claims()

    async def history(self, query: HistoryQuery) -> Sequence[HistoryEntry]:
        return await self._store.history(query)

    async def delete_history(self, query: HistoryQuery) -> int:
        return await self._store.delete_history(query)

    async def prune_history(self, bounds: HistoryBounds) -> int:
        return await self._store.prune_history(bounds)

    async def tokens(self, after: str = "", limit: int = 1000) -> Sequence[JoinToken]:
        return await self._store.tokens(after, limit)

    async def use_counts(self, token_ids: Collection[str], now: float) -> Mapping[str, int]:
        return await self._store.use_counts(token_ids, now)

    async def audit_entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        return await self._store.audit_entries(query)

    async def prune_audit(self, before: float, most: int) -> int:
        return await self._store.prune_audit(before, most)

    async def note_principals(self, used: Mapping[str, tuple[float, str]]) -> None:
        await self._store.note_principals(used)

    def changes(self, wanted: Wanted | None = None) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        return self._store.changes(wanted)
