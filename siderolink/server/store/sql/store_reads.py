"""Reads and deletions outside of works' transactions, common to both SQL stores; each runs them on its own connection."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from anyio.lowlevel import checkpoint
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import Select

from siderolink.server.store.audit import AuditEntry, AuditQuery
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryQuery
from siderolink.server.store.ownership import Ownership
from siderolink.server.store.rows import Ban, BanGrounds, Claim, Machine
from siderolink.server.store.sql import audit, history, tables
from siderolink.server.store.tokens import JoinToken

T = TypeVar("T")

_PAGE = 1024
_ROWS_IN_ONE_GO = 64
"""Rows that are parsed before other tasks run."""


class StoreReads(ABC):
    """The part of `Store` that SQLite and Postgres share. Every method raises StoreError."""

    @abstractmethod
    async def _on_connection(self, work: Callable[[AsyncConnection], Coroutine[Any, Any, T]]) -> T:
        """Run statements separately and to completion, even if the caller is cancelled; returns their result."""

    async def _read(self, statement: Select[Any], read: Callable[[Mapping[Any, Any]], T]) -> list[T]:
        async def rows(connection: AsyncConnection) -> list[T]:
            result = await connection.execute(statement)
            names, found = tuple(result.keys()), list[T]()
            for part in result.partitions(_ROWS_IN_ONE_GO):
                if found:
                    await checkpoint()
                found += [read(dict(zip(names, row, strict=True))) for row in part]
            return found

        return await self._on_connection(rows)

    async def _pages(
        self, page_after: Callable[[str], Select[Any]], read: Callable[[Mapping[Any, Any]], T], id_of: Callable[[T], str]
    ) -> AsyncIterator[T]:
        """All rows, page by page; each page is a consistent view."""
        last = ""
        while True:
            page = await self._read(page_after(last), read)
            for row in page:
                yield row
            if len(page) < _PAGE:
                return
            last = id_of(page[-1])

    def machines(self) -> AsyncIterator[Machine]:
        """Page by page; each page is a consistent view."""
        columns = tables.machines.c

        def page_after(last: str) -> Select[Any]:
            return select(tables.machines).where(columns.id > last).order_by(columns.id).limit(_PAGE)

        return self._pages(page_after, tables.read_machine, lambda machine: machine.id)

    def owners(self, server_id: str | None = None) -> AsyncIterator[Ownership]:
        """Page by page, like `machines`."""

        def page_after(last: str) -> Select[Any]:
            return tables.owners_after(last, server_id, _PAGE)

        return self._pages(page_after, tables.read_ownership, lambda owner: owner.machine_id)

    async def bans(self) -> Mapping[Ban, BanGrounds]:
        def read(row: Mapping[Any, Any]) -> tuple[Ban, BanGrounds]:
            return tables.read_ban(row["kind"], row["value"]), tables.read_grounds(row)

        return dict(await self._read(select(tables.bans), read))

    async def all_claims(self) -> Sequence[Claim]:
        return await self._read(select(tables.claims).order_by(tables.claims.c.created_at), tables.read_claim)

    async def tokens(self, after: str = "", limit: int = _PAGE) -> Sequence[JoinToken]:
        return await self._read(tables.token_page(after, limit), tables.read_token)

    async def use_counts(self, token_ids: Collection[str], now: float) -> Mapping[str, int]:
        rows = await self._read(tables.use_counts(token_ids, now), lambda row: (row["token_id"], row["count"]))
        return dict(rows)

    async def history(self, query: HistoryQuery) -> Sequence[HistoryEntry]:
        return await self._read(history.find(query), history.read_entry)

    async def delete_history(self, query: HistoryQuery) -> int:
        return await history.remove(self._on_connection, query)

    async def prune_history(self, bounds: HistoryBounds) -> int:
        return await history.prune(self._on_connection, bounds)

    async def audit_entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        return await self._read(audit.find(query), audit.read_entry)

    async def prune_audit(self, before: float, most: int) -> int:
        return await self._on_connection(lambda connection: audit.prune(connection, before, most))

    async def note_principals(self, used: Mapping[str, tuple[float, str]]) -> None:
        await self._on_connection(lambda connection: audit.note_principals(connection, used))
