"""The history in each store: appended in a transaction, found by machine and UUID, and pruned in parts."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest

from siderolink.server.store import HistoryBounds, HistoryEntry, HistoryKind, HistoryQuery, Store, Transaction
from siderolink.server.store import history as memory
from siderolink.server.store.sql import history as statements
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    async with opened(request.param) as store:
        yield store


def entry(at: float, machine_id: str = "1", *, uuid: str = "", kind: HistoryKind = HistoryKind.UP) -> HistoryEntry:
    return HistoryEntry(at=at, machine_id=machine_id, node_uuid=uuid or f"uuid-{machine_id}", kind=kind, detail=f"at {at:g}")


async def add(store: Store, entries: Sequence[HistoryEntry]) -> None:
    await store.transact(lambda transaction: transaction.add_history(entries))


async def times(store: Store, query: HistoryQuery) -> list[float]:
    return [found.at for found in await store.history(query)]


async def test_entries_come_back_as_they_were_the_newest_first(store: Store) -> None:
    written = HistoryEntry(
        at=1.5,
        machine_id="1",
        node_uuid="u",
        kind=HistoryKind.JOINED,
        detail="new\nline \N{RIGHT-TO-LEFT OVERRIDE}",
        transport="udp",
        source="192.0.2.1",
        version="v1.10.0",
        join_token="0123456789ab",
        count=3,
    )
    await add(store, [written, entry(2), entry(3, "2")])
    found = await store.history(HistoryQuery())
    assert [one.at for one in found] == [3, 2, 1.5]
    assert found[0].seq > found[1].seq > found[2].seq > 0
    assert found[2] == replace(written, seq=found[2].seq)


async def test_a_query_matches_what_it_names(store: Store) -> None:
    refused = entry(3, "", uuid="uuid-1", kind=HistoryKind.REFUSED)
    await add(store, [entry(1), entry(2, "2"), refused, entry(4), entry(5, kind=HistoryKind.DOWN)])
    assert await times(store, HistoryQuery(machine_id="1")) == [5, 4, 1]
    assert await times(store, HistoryQuery(machine_id="1", node_uuid="uuid-1")) == [5, 4, 3, 1]
    assert await times(store, HistoryQuery(kinds=[HistoryKind.DOWN, HistoryKind.REFUSED])) == [5, 3]
    assert await times(store, HistoryQuery(since=2, until=5)) == [4, 3, 2]
    page = await store.history(HistoryQuery(limit=2))
    assert [one.at for one in page] == [5, 4]
    assert await times(store, HistoryQuery(limit=2, before_seq=page[-1].seq)) == [3, 2]
    assert await times(store, HistoryQuery(limit=2, after_seq=0)) == [1, 2]


async def test_an_undone_transaction_appends_nothing(store: Store) -> None:
    async def work(transaction: Transaction) -> None:
        await transaction.add_history([entry(1)])
        raise LookupError

    with pytest.raises(LookupError):
        await store.transact(work)
    assert await store.history(HistoryQuery()) == []


async def test_a_delete_removes_only_what_its_query_matches_and_numbers_are_not_reused(store: Store) -> None:
    await add(store, [entry(1), entry(2, "2"), entry(3)])
    last = (await store.history(HistoryQuery(limit=1)))[0].seq
    assert await store.delete_history(HistoryQuery(machine_id="1", limit=1)) == 2
    assert await times(store, HistoryQuery()) == [2]
    await add(store, [entry(4)])
    assert (await store.history(HistoryQuery(limit=1)))[0].seq > last


async def test_pruning_keeps_the_newest_entries_of_each_machine_and_of_all(store: Store) -> None:
    await add(store, [entry(at, str(at % 3)) for at in range(300)])
    await add(store, [entry(at, "", uuid=f"stranger-{at}", kind=HistoryKind.REFUSED) for at in range(300, 700)])
    bounds = HistoryBounds(since=30.0, per_machine=20, total=1000)
    while await store.prune_history(bounds):
        pass
    assert await times(store, HistoryQuery(machine_id="0")) == list(range(297, 237, -3))
    assert await times(store, HistoryQuery(machine_id="")) == list(range(699, 499, -1))  # ten times as many
    assert len(await store.history(HistoryQuery())) == 3 * 20 + 200
    while await store.prune_history(HistoryBounds(since=690.0, per_machine=20, total=5)):
        pass
    assert await times(store, HistoryQuery()) == [699, 698, 697, 696, 695]


@pytest.mark.parametrize("kind", ["memory", "sql"])
async def test_others_wait_for_one_part_of_a_long_prune_at_most(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: while entries are pruned and deleted, a transaction comes between every two pieces."""
    monkeypatch.setattr(statements, "ROWS_COUNTED", 50)
    monkeypatch.setattr(statements, "ROWS_DELETED", 20)
    monkeypatch.setattr(memory, "_PART", 20)
    async with opened(kind) as store:
        for first in range(0, 1000, 100):
            await add(store, [entry(at, str(at % 7)) for at in range(first, first + 100)])
        between = 0

        async def transactions() -> None:
            nonlocal between
            while True:
                await store.transact(lambda transaction: transaction.server())
                between += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transactions)
            assert await store.prune_history(HistoryBounds(since=100.0, per_machine=100, total=500)) == 500
            assert between >= 1000 // 50 + 500 // 20 - 5
            between = 0
            assert await store.delete_history(HistoryQuery(until=900.0)) == 400
            assert between >= 400 // 20 - 5
            tasks.cancel_scope.cancel()
        assert await times(store, HistoryQuery()) == list(range(999, 899, -1))
