"""A store on Postgres with more transactions at once than it has connections."""

from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest

from siderolink.server.store import ServerRecord, Transaction
from siderolink.server.store.base import Work
from siderolink.server.store.measured import MeasuredStore
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import STATE_KEY, cluster

pytestmark = pytest.mark.anyio

Transact = Callable[[Work[None]], Awaitable[None]]

WORKERS, CONNECTIONS = 16, 3


class Load:
    """Workers that begin their next transaction the moment their last one has ended, until they are stopped."""

    def __init__(self, store: PostgresStore) -> None:
        self.store = store
        self.done = 0

    async def read(self, transaction: Transaction) -> ServerRecord | None:
        return await transaction.server()

    async def work(self) -> None:
        while True:
            await self.store.transact(self.read)
            self.done += 1

    async def overtaken_by(self, transact: Transact) -> int:
        """How many of the workers' transactions end before one by `transact` begins."""
        before, begun_at = self.done, list[int]()

        async def work(transaction: Transaction) -> None:
            begun_at.append(self.done)
            await transaction.server()

        with anyio.fail_after(60):
            await transact(work)
        return begun_at[0] - before

    async def await_done(self, count: int) -> None:
        with anyio.fail_after(60):
            while self.done < count:
                await anyio.sleep(0.001)


@pytest.fixture
async def load() -> AsyncIterator[Load]:
    with cluster().database() as database:
        async with PostgresStore.open(cluster().url(database), key=STATE_KEY, connections=CONNECTIONS) as store:
            found = Load(store)
            async with anyio.create_task_group() as tasks:
                for _ in range(WORKERS):
                    tasks.start_soon(found.work)
                await found.await_done(WORKERS)
                yield found
                tasks.cancel_scope.cancel()


async def test_a_transaction_waits_only_for_earlier_ones(load: Load) -> None:
    """Otherwise busy workers would keep all connections, and others would wait as long as the load lasts.

    On a busy host one connection may stand still while others go on, so most of the transactions count.
    """
    overtaken = sorted([await load.overtaken_by(load.store.transact) for _ in range(21)])
    assert overtaken[10] <= WORKERS + CONNECTIONS


async def test_a_heartbeat_waits_for_no_transaction(load: Load) -> None:
    """Otherwise other servers would declare a busy server dead."""
    for store in (load.store, MeasuredStore(load.store)):
        # it has its own connection, so few of the others complete meanwhile, never the whole queue
        overtaken = sorted([await load.overtaken_by(store.transact_urgently) for _ in range(51)])
        assert overtaken[25] < WORKERS - CONNECTIONS
