"""A new store of each kind."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from siderolink.server.store import MemoryStore, Store
from siderolink.server.store.sql import SqlStore
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import STATE_KEY, cluster

KINDS = ("memory", "sql", "postgres")


@asynccontextmanager
async def opened(kind: str, feed_limit: int = 1024) -> AsyncIterator[Store]:
    """A new store of each kind."""
    if kind == "memory":
        yield MemoryStore(feed_limit=feed_limit)
        return
    if kind == "postgres":
        with cluster().database() as database:
            async with PostgresStore.open(cluster().url(database), feed_limit=feed_limit, key=STATE_KEY) as store:
                yield store
        return
    with tempfile.TemporaryDirectory() as folder:
        async with SqlStore.open(Path(folder, "state"), feed_limit=feed_limit) as store:
            yield store
