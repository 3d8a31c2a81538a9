"""A store in a SQLite file, which outlives the server: by SQLAlchemy's async engine and Alembic's migrations."""

import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import anyio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from siderolink.common.errors import StoreError
from siderolink.common.tasks import background_tasks
from siderolink.server.store.audit import AuditEntry, AuditQuery
from siderolink.server.store.base import Ban, BanGrounds, Claim, Machine, Work
from siderolink.server.store.feed import DEFAULT_FEED_LIMIT, Change, Feeds
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryQuery
from siderolink.server.store.ownership import Ownership
from siderolink.server.store.sealing import KeyFile, Sealer, StateKey, key_file_beside
from siderolink.server.store.sql import audit, history, tables
from siderolink.server.store.sql.batches import Batches
from siderolink.server.store.sql.file import CLOSE_SECONDS, open_file
from siderolink.server.store.tokens import JoinToken

T = TypeVar("T")

_PAGE = 1024


class SqlStore:
    """See `Store`. One server at a time has the file open."""

    kind = "sqlite"
    is_shared = False

    def __init__(self, connection: AsyncConnection, driver: aiosqlite.Connection, feed_limit: int, key: StateKey) -> None:
        """For `open`."""
        self.sealer = Sealer(key)
        self._connection = connection
        self._driver = driver
        self._feeds = Feeds(feed_limit)
        self._batches = Batches(driver, self._feeds.publish)
        self._running = anyio.CancelScope(shield=True)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: str | os.PathLike[str], *, feed_limit: int = DEFAULT_FEED_LIMIT, key: StateKey | None = None
    ) -> AsyncIterator["SqlStore"]:
        """Open or create the file, readable only by its owner. Leaving completes queued transactions.

        `key` seals the secrets in it; by default it is in a file beside it, PATH.key, which is made at a server's first start.

        Raises StoreError for an unusable file, and never changes one.
        """
        async with open_file(Path(path)) as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, aiosqlite.Connection)
            store = cls(connection, driver, feed_limit, key or KeyFile(key_file_beside(Path(path))))
            async with background_tasks() as tasks:
                tasks.start_soon(store._run, name="siderolink store")
                try:
                    yield store
                finally:
                    await store._close()

    async def _run(self) -> None:
        # An outside cancellation does not stop it, because cancelled tasks may still have something to write.
        with self._running:
            await self._batches.run()

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
            await self._batches.close()
        self._running.cancel()

    def time(self) -> float:
        return time.time()

    async def transact(self, work: Work[T]) -> T:
        result: T = await self._batches.submit(work)
        return result

    async def machines(self) -> AsyncIterator[Machine]:
        """Page by page, each as it was between two batches."""
        last = ""
        while True:
            page: list[Machine] = []

            async def read(after: str = last, page: list[Machine] = page) -> None:
                columns = tables.machines.c
                statement = select(tables.machines).where(columns.id > after).order_by(columns.id).limit(_PAGE)
                async with self._connection.begin():
                    page += [tables.read_machine(row) for row in (await self._connection.execute(statement)).mappings()]

            await self._batches.alone(read)
            for machine in page:
                yield machine
            if len(page) < _PAGE:
                return
            last = page[-1].id

    async def owners(self, server_id: str | None = None) -> AsyncIterator[Ownership]:
        """Page by page, as `machines`."""
        last = ""
        while True:
            page: list[Ownership] = []

            async def read(after: str = last, page: list[Ownership] = page) -> None:
                async with self._connection.begin():
                    rows = await self._connection.execute(tables.owners_after(after, server_id, _PAGE))
                    page += [tables.read_ownership(row) for row in rows.mappings()]

            await self._batches.alone(read)
            for owner in page:
                yield owner
            if len(page) < _PAGE:
                return
            last = page[-1].machine_id

    async def bans(self) -> Mapping[Ban, BanGrounds]:
        found: dict[Ban, BanGrounds] = {}

        async def read() -> None:
            async with self._connection.begin():
                rows = await self._connection.execute(select(tables.bans))
                found.update((tables.read_ban(row["kind"], row["value"]), tables.read_grounds(row)) for row in rows.mappings())

        await self._batches.alone(read)
        return found

    async def all_claims(self) -> Sequence[Claim]:
        found: list[Claim] = []

        async def read() -> None:
            async with self._connection.begin():
                rows = await self._connection.execute(select(tables.claims).order_by(tables.claims.c.created_at))
                found.extend(tables.read_claim(row) for row in rows.mappings())

        await self._batches.alone(read)
        return found

    async def history(self, query: HistoryQuery) -> Sequence[HistoryEntry]:
        found: list[HistoryEntry] = []

        async def read() -> None:
            async with self._connection.begin():
                rows = await self._connection.execute(history.find(query))
                found.extend(history.read_entry(row) for row in rows.mappings())

        await self._batches.alone(read)
        return found

    async def tokens(self, after: str = "", limit: int = _PAGE) -> Sequence[JoinToken]:
        found: list[JoinToken] = []

        async def read() -> None:
            async with self._connection.begin():
                rows = await self._connection.execute(tables.token_page(after, limit))
                found.extend(tables.read_token(row) for row in rows.mappings())

        await self._batches.alone(read)
        return found

    async def use_counts(self, token_ids: Collection[str], now: float) -> Mapping[str, int]:
        found: dict[str, int] = {}

        async def read() -> None:
            async with self._connection.begin():
                rows = await self._connection.execute(tables.use_counts(token_ids, now))
                found.update((token_id, count) for token_id, count in rows)

        await self._batches.alone(read)
        return found

    async def delete_history(self, query: HistoryQuery) -> int:
        return await history.remove(self._change, query)

    async def prune_history(self, bounds: HistoryBounds) -> int:
        return await history.prune(self._change, bounds)

    async def audit_entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        found: list[AuditEntry] = []

        async def read() -> None:
            async with self._connection.begin():
                rows = await self._connection.execute(audit.find(query))
                found.extend(audit.read_entry(row) for row in rows.mappings())

        await self._batches.alone(read)
        return found

    async def prune_audit(self, before: float, most: int) -> int:
        return await self._change(lambda connection: audit.prune(connection, before, most))

    async def note_principals(self, used: Mapping[str, tuple[float, str]]) -> None:
        await self._change(lambda connection: audit.note_principals(connection, used))

    async def _change(self, change: Callable[[AsyncConnection], Coroutine[Any, Any, T]]) -> T:
        """Run statements in a transaction of their own, between two batches; returns what they return."""
        results: list[T] = []

        async def work() -> None:
            async with self._connection.begin():
                results.append(await change(self._connection))

        await self._batches.alone(work)
        return results[0]

    def changes(self) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        return self._feeds.follow()

    async def backup(self, path: Path) -> None:
        """Write a whole copy to a new file, readable by its owner alone, while the store is in use. Raises StoreError."""
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreError(f"the copy {path} cannot be created: {error.strerror}") from None

        async def copy() -> None:
            await self._driver.execute("VACUUM INTO ?", (str(path),))

        await self._batches.alone(copy)
