"""A store on Postgres, which several servers may share."""

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from siderolink.common.errors import ConfigurationError, StoreError, StoreUnavailableError
from siderolink.common.tasks import background_tasks, to_its_end
from siderolink.server.store.base import Work
from siderolink.server.store.feed import DEFAULT_FEED_LIMIT, Change, Feeds, Wanted
from siderolink.server.store.sealing import GivenKey, Sealer, StateKey
from siderolink.server.store.sql.postgres.database import CONNECTIONS, ContendedError, Database, database_url
from siderolink.server.store.sql.postgres.feed import FeedReader
from siderolink.server.store.sql.postgres.transactions import run_work
from siderolink.server.store.sql.store_reads import StoreReads

T = TypeVar("T")

NO_KEY = (
    "a state in Postgres needs the key that its servers share, and none was given; pass key=KeyFile(path), which "
    "creates one if necessary, or leave the server's key and the tokens readable: unsealed_secrets=True"
)


class PostgresStore(StoreReads):
    """See `Store`."""

    kind = "postgres"
    is_shared = True

    def __init__(self, database: Database, feed_limit: int, key: StateKey) -> None:
        """Use `open`."""
        self.sealer = Sealer(key)
        self._database = database
        self._feed = FeedReader(database, Feeds(feed_limit))
        self._is_open = True

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        password: str | None = None,
        connections: int = CONNECTIONS,
        feed_limit: int = DEFAULT_FEED_LIMIT,
        alone: bool = False,
        key: StateKey | None = None,
        unsealed_secrets: bool = False,
    ) -> AsyncIterator["PostgresStore"]:
        """Connect to ``postgresql://USER@HOST:PORT/DATABASE`` and upgrade its schema if necessary.

        The database's TLS certificate must match its name, unless it is on this host or the URL says otherwise (`sslmode`).
        `alone` refuses a database that a server uses. `key` seals the secrets and must be the same for all servers;
        `unsealed_secrets` works without a key, but secrets that are already sealed still need it.

        Raises ConfigurationError for an invalid URL or a missing key; StoreError for a database that cannot be used.
        """
        if key is None and not unsealed_secrets:
            raise ConfigurationError(NO_KEY)
        database = Database(database_url(url, password, alone=alone), connections=connections)
        try:
            store = cls(database, feed_limit, key or GivenKey(None, "no state key was given"))
            await database.prepare(alone=alone)
            await store._feed.start()
            async with background_tasks() as tasks:
                for part in (store._feed.read, store._feed.listen, store._feed.notify, store._feed.prune):
                    tasks.start_soon(part)
                try:
                    yield store
                finally:
                    store._is_open = False
        finally:
            await database.close()

    @property
    def name(self) -> str:
        """A description of the database."""
        return self._database.name

    def time(self) -> float:
        """Unix time by the database's clock, as of the last second."""
        return self._feed.time()

    async def transact(self, work: Work[T]) -> T:
        return await self._run(work, urgent=False)

    async def transact_urgently(self, work: Work[T]) -> T:
        return await self._run(work, urgent=True)

    async def _run(self, work: Work[T], *, urgent: bool) -> T:
        if not self._is_open:
            raise StoreError("the store is closed")
        result, has_changed = await run_work(self._database, work, urgent=urgent)
        if has_changed:
            self._feed.note_change()
        return result

    async def _on_connection(self, work: Callable[[AsyncConnection], Coroutine[Any, Any, T]]) -> T:
        try:
            async with self._database.connect() as connection:
                return await to_its_end(work(connection))
        except ContendedError as error:
            raise StoreUnavailableError(str(error)) from error

    def changes(self, wanted: Wanted | None = None) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """See `Store`. After a restart of the database, and to a reader that is far behind, it publishes ChangesLost."""
        return self._feed.follow(wanted)

    async def prune_changes(self, kept_seconds: float) -> None:
        """Remove older changes now; this also happens every minute. Raises StoreError."""
        try:
            await self._feed.prune_now(kept_seconds)
        except ContendedError as error:
            raise StoreUnavailableError(str(error)) from error
