"""A store in a SQLite file, by SQLAlchemy's async engine and Alembic's migrations."""

import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import anyio
from sqlalchemy.ext.asyncio import AsyncConnection

from siderolink.common.errors import StoreError
from siderolink.common.private_files import open_new
from siderolink.common.tasks import background_tasks
from siderolink.server.store.base import Work
from siderolink.server.store.feed import DEFAULT_FEED_LIMIT, Change, Feeds, Wanted
from siderolink.server.store.sealing import KeyFile, Sealer, StateKey, key_file_beside
from siderolink.server.store.sql.batches import Batches
from siderolink.server.store.sql.file import CLOSE_SECONDS, Place, open_file
from siderolink.server.store.sql.store_reads import StoreReads

T = TypeVar("T")


class SqlStore(StoreReads):
    """See `Store`. Only one server at a time can open the file."""

    kind = "sqlite"
    is_shared = False

    def __init__(
        self, connection: AsyncConnection, driver: aiosqlite.Connection, place: Place, feed_limit: int, key: StateKey
    ) -> None:
        """Use `open`."""
        self.sealer = Sealer(key)
        self._connection = connection
        self._driver = driver
        self._feeds = Feeds(feed_limit)
        self._batches = Batches(driver, self._feeds.publish, place.check)
        self._running = anyio.CancelScope(shield=True)

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: str | os.PathLike[str], *, feed_limit: int = DEFAULT_FEED_LIMIT, key: StateKey | None = None
    ) -> AsyncIterator["SqlStore"]:
        """Open or create the file, readable only by its owner. Leaving the context completes queued transactions.

        `key` seals the secrets in it; the default is a file next to it, PATH.key, created at a server's first start.

        Raises StoreError for an unusable file, which is never modified.
        """
        async with open_file(Path(path)) as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, aiosqlite.Connection)
            store = cls(connection, driver, Place(Path(path)), feed_limit, key or KeyFile(key_file_beside(Path(path))))
            async with background_tasks() as tasks:
                tasks.start_soon(store._run, name="siderolink store")
                try:
                    yield store
                finally:
                    await store._close()

    async def _run(self) -> None:
        # Not stopped by an outside cancellation: cancelled tasks may still have something to write.
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

    async def transact_urgently(self, work: Work[T]) -> T:
        return await self.transact(work)  # nobody waits for more than the batches before it

    async def _on_connection(self, work: Callable[[AsyncConnection], Coroutine[Any, Any, T]]) -> T:
        """Run in a transaction of its own, between two batches."""
        results: list[T] = []

        async def run() -> None:
            async with self._connection.begin():
                results.append(await work(self._connection))

        await self._batches.alone(run)
        return results[0]

    def changes(self, wanted: Wanted | None = None) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        return self._feeds.follow(wanted)

    async def backup(self, path: Path) -> None:
        """Write a full copy to a new file, readable only by its owner, while the store is in use. Raises StoreError."""
        try:
            os.close(open_new(path))
        except OSError as error:
            raise StoreError(f"the copy {path} cannot be created: {error.strerror}") from None

        async def copy() -> None:
            await self._driver.execute("VACUUM INTO ?", (str(path),))

        await self._batches.alone(copy)
