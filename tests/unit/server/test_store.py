"""Each store compared with a slow, obvious model, and the guarantees of the store's contract."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from ipaddress import IPv6Address
from itertools import product
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink.common.errors import StoreError, StoreUnavailableError
from siderolink.common.keys import PrivateKey, PublicKey
from siderolink.server.store import (
    AuditQuery,
    Ban,
    BanChanged,
    ChangesLost,
    Claim,
    ClaimChanged,
    HistoryQuery,
    LastSeen,
    Machine,
    MachineAdmission,
    MachineChanged,
    MachineDeleted,
    ServerRecord,
    Store,
    Transaction,
    UniqueViolationError,
)
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio

UNIQUE = ("node_uuid", "public_key", "overlay_address", "virtual_address")


def machine(machine_id: int, uuid: int, key: int | None = None, overlay: int = 0, virtual: int | None = None) -> Machine:
    return Machine(
        id=str(machine_id),
        node_uuid=f"uuid-{uuid}",
        public_key=None if key is None else PublicKey(bytes([key]) * 32),
        overlay_address=IPv6Address(overlay),
        virtual_address=None if virtual is None else IPv6Address(virtual),
        created_at=0.0,
        joined_at=0.0,
    )


SMALL = st.integers(0, 2)
ROWS = st.builds(machine, SMALL, SMALL, st.none() | SMALL, SMALL, st.none() | SMALL)
STEPS = st.lists(st.tuples(st.sampled_from(["insert", "update", "delete", "undone"]), ROWS), max_size=30)


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    async with opened(request.param) as store:
        yield store


class Model:
    """Keeps rows in a list and checks uniqueness by comparing all of them."""

    def __init__(self) -> None:
        self.rows: dict[str, Machine] = {}

    def violates(self, row: Machine) -> bool:
        return any(
            getattr(row, column) is not None and getattr(row, column) == getattr(other, column)
            for other in self.rows.values()
            if other.id != row.id
            for column in UNIQUE
        )

    def apply(self, step: str, row: Machine) -> bool:
        """Whether the step succeeds."""
        exists = row.id in self.rows
        if step == "delete":
            self.rows.pop(row.id, None)
            return True
        if exists == (step == "insert") or self.violates(row):
            return False
        self.rows[row.id] = replace(row, revision=self.rows[row.id].revision + 1 if exists else 1)
        return True


def work_of(step: str, row: Machine) -> Callable[[Transaction], Awaitable[object]]:
    async def work(transaction: Transaction) -> object:
        match step:
            case "insert":
                return await transaction.insert(row)
            case "update":
                return await transaction.update(row)
            case "delete":
                return await transaction.delete(row.id)
        await transaction.delete(row.id)
        await transaction.insert(row)
        await transaction.update(replace(row, public_key=None))
        await transaction.set_banned(Ban(value="uuid-0"), True)
        raise StoreError("undo this")

    return work


@given(STEPS)
def test_the_memory_store_behaves_like_the_model(steps: list[tuple[str, Machine]]) -> None:
    anyio.run(_follow_the_model, "memory", steps)


@given(STEPS)
@settings(max_examples=25, deadline=None)
def test_the_sql_store_behaves_like_the_model(steps: list[tuple[str, Machine]]) -> None:
    anyio.run(_follow_the_model, "sql", steps)


@given(STEPS)
@settings(max_examples=25, deadline=None)
def test_the_postgres_store_behaves_like_the_model(steps: list[tuple[str, Machine]]) -> None:
    anyio.run(_follow_the_model, "postgres", steps)


async def _follow_the_model(kind: str, steps: list[tuple[str, Machine]]) -> None:
    async with opened(kind) as store:
        model = Model()
        for step, row in steps:
            try:
                await store.transact(work_of(step, row))
                succeeded = True
            except StoreError:
                succeeded = False
            assert succeeded == (step != "undone" and model.apply(step, row))
            rows = {found.id: found async for found in store.machines()}
            assert rows == model.rows
            await store.transact(lambda transaction: _finds_exactly(transaction, model))


async def _finds_exactly(transaction: Transaction, model: Model) -> None:
    for number in range(3):
        key = PublicKey(bytes([number]) * 32)
        by_uuid = [row for row in model.rows.values() if row.node_uuid == f"uuid-{number}"]
        by_key = [row for row in model.rows.values() if row.public_key == key]
        assert await transaction.machine_by_uuid(f"uuid-{number}") == next(iter(by_uuid), None)
        assert await transaction.machine_by_key(key) == next(iter(by_key), None)
        assert await transaction.machine(str(number)) == model.rows.get(str(number))
    assert not await transaction.is_banned(Ban(value="uuid-0"))


async def test_a_violation_names_its_column_and_the_transaction_goes_on(store: Store) -> None:

    async def work(transaction: Transaction) -> Machine:
        await transaction.insert(machine(1, uuid=1, overlay=7))
        with pytest.raises(UniqueViolationError) as caught:
            await transaction.insert(machine(2, uuid=2, overlay=7))
        assert caught.value.column == "overlay_address"
        return await transaction.insert(machine(2, uuid=2, overlay=8))

    assert (await store.transact(work)).id == "2"
    assert len([row async for row in store.machines()]) == 2


async def test_an_undone_swap_leaves_both_rows_as_they_were(store: Store) -> None:
    one, two = machine(1, 1, key=1, overlay=1), machine(2, 2, key=2, overlay=2)

    async def fill(transaction: Transaction) -> None:
        await transaction.insert(one)
        await transaction.insert(two)

    async def swap(transaction: Transaction) -> None:
        await transaction.update(replace(one, public_key=None))
        await transaction.update(replace(two, public_key=one.public_key))
        await transaction.update(replace(one, public_key=two.public_key))
        raise StoreError("no")

    await store.transact(fill)
    with pytest.raises(StoreError):
        await store.transact(swap)
    assert {row.id: row.public_key async for row in store.machines()} == {"1": one.public_key, "2": two.public_key}


async def test_changes_are_reported_after_commit_and_in_order(store: Store) -> None:

    async def work(transaction: Transaction) -> None:
        await transaction.insert(machine(1, 1))
        await transaction.set_banned(Ban(value="uuid-9"), True)
        await transaction.set_banned(Ban(value="uuid-9"), True)
        await transaction.delete("1")

    async with store.changes() as changes:
        with pytest.raises(StoreError):
            await store.transact(work_of("undone", machine(5, 5)))
        await store.transact(work)
        row = replace(machine(1, 1), revision=1)
        assert [await anext(changes) for _ in range(3)] == [
            MachineChanged(machine=row),
            BanChanged(ban=Ban(value="uuid-9"), banned=True),
            MachineDeleted(machine=row),
        ]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_reader_learns_that_it_lost_changes(kind: str) -> None:
    async def work(transaction: Transaction) -> None:
        for number in range(3):
            await transaction.insert(machine(number, number, overlay=number))

    async with opened(kind, feed_limit=2) as store, store.changes() as changes:
        await store.transact(work)
        assert await anext(changes) == ChangesLost()


async def test_transactions_do_not_see_uncommitted_changes(store: Store) -> None:
    await store.transact(work_of("insert", machine(1, 1)))

    async def count_up(transaction: Transaction) -> None:
        row = await transaction.machine("1")
        assert row is not None
        await anyio.lowlevel.checkpoint()
        await transaction.update(replace(row, created_at=row.created_at + 1))

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(store.transact, count_up)
    assert [row.created_at async for row in store.machines()] == [10.0]


async def test_concurrent_transactions_are_serialized(store: Store) -> None:
    """Sixty machines fight over ten keys: each takes its key from whoever holds it."""
    log: list[str] = []

    async def take(number: int) -> None:
        key = PublicKey(bytes([number % 10]) * 32)

        async def work(transaction: Transaction) -> None:
            await transaction.insert(machine(number, number, overlay=number))
            holder = await transaction.machine_by_key(key)
            await anyio.lowlevel.checkpoint()
            if holder is not None:
                await transaction.update(replace(holder, public_key=None))
            mine = await transaction.machine(str(number))
            assert mine is not None
            await transaction.update(replace(mine, public_key=key))

        await store.transact(work)
        log.append(str(number))

    async with store.changes() as changes:
        async with anyio.create_task_group() as tasks:
            for number in range(60):
                tasks.start_soon(take, number)
        rows = {row.id: row async for row in store.machines()}
        assert len(rows) == 60
        assert sorted(log, key=int) == sorted(rows, key=int)
        assert len({row.public_key for row in rows.values()}) == 11  # one holder each, and None
        replayed: dict[str, Machine] = {}
        while replayed != rows:  # the feed reports it in a consistent order
            change = await anext(changes)
            assert isinstance(change, MachineChanged)
            before = replayed.get(change.machine.id)
            assert change.machine.revision == (before.revision + 1 if before else 1)
            replayed[change.machine.id] = change.machine
            keys = [row.public_key for row in replayed.values() if row.public_key]
            assert len(keys) == len(set(keys))


async def test_one_address_goes_to_one_machine(store: Store) -> None:
    async def claim(number: int) -> None:
        try:
            await store.transact(work_of("insert", machine(number, number, overlay=7, virtual=8)))
        except UniqueViolationError as error:
            refused.append(error.column)

    refused: list[str] = []
    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(claim, number)
    assert len([row async for row in store.machines()]) == 1
    assert len(refused) == 19


async def test_a_last_seen_time_changes_no_revision_and_is_not_in_the_feed(store: Store) -> None:
    await store.transact(work_of("insert", machine(1, 1)))
    seen = LastSeen(endpoint="192.0.2.7:1234", seen_at=5.0, handshake_at=4.0)
    async with store.changes() as changes:
        await store.transact(lambda transaction: transaction.note({"1": seen, "unknown": seen}, 5.0))
        await store.transact(lambda transaction: transaction.note({"1": LastSeen(endpoint=None, seen_at=6.0)}, 6.0))
        await store.transact(work_of("insert", machine(2, 2, overlay=2)))
        first = await anext(changes)
    assert isinstance(first, MachineChanged)
    assert first.machine.id == "2"
    [row] = [row async for row in store.machines() if row.id == "1"]
    assert (row.last_endpoint, row.last_handshake_at, row.seen_at, row.revision) == (None, 4.0, 6.0, 1)


async def test_notes_and_the_server_record_are_rolled_back(store: Store) -> None:
    record = ServerRecord(private_key=bytes(PrivateKey.generate()), installation_id="here", timestamp_mark=bytes(range(12)))

    async def work(transaction: Transaction) -> None:
        await transaction.set_server(record)
        await transaction.note({"1": LastSeen(endpoint="192.0.2.7:1", seen_at=1.0)}, 1.0)
        raise StoreError("no")

    await store.transact(work_of("insert", machine(1, 1)))
    with pytest.raises(StoreError):
        await store.transact(work)
    assert [row.seen_at async for row in store.machines()] == [None]
    assert await store.transact(lambda transaction: transaction.server()) is None
    await store.transact(lambda transaction: transaction.set_server(record))
    assert await store.transact(lambda transaction: transaction.server()) == record


@pytest.mark.parametrize("text", ["half of a pair \ud800", "a NUL \0"])
async def test_a_text_that_cannot_be_stored_is_refused_and_the_store_goes_on(store: Store, text: str) -> None:
    """It does not count as an outage. The memory store accepts any text."""
    insert, find = work_of("insert", replace(machine(1, 1), unique_fingerprint=text)), lambda found: found.machine(text)
    errors: list[type[StoreError]] = []
    for work in (insert, find):
        try:
            await store.transact(work)
        except StoreError as error:
            errors.append(type(error))
    assert StoreUnavailableError not in errors
    await store.transact(work_of("insert", machine(2, 2, overlay=2)))
    assert [row.id async for row in store.machines()][-1] == "2"


async def test_a_caller_that_gives_up_breaks_nothing(store: Store) -> None:
    begun, go_on = anyio.Event(), anyio.Event()

    async def slow(transaction: Transaction) -> None:
        await transaction.insert(machine(1, 1))
        begun.set()
        await go_on.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.transact, slow)
        await begun.wait()
        tasks.cancel_scope.cancel()
        go_on.set()  # on Postgres a started transaction is completed
    await store.transact(work_of("insert", machine(2, 2, overlay=2)))
    assert "2" in {row.id async for row in store.machines()}


async def test_a_reader_that_is_cut_off_breaks_nothing(store: Store) -> None:
    """Cancel each read at each of its steps, like a handler whose client disconnects."""
    await store.transact(work_of("insert", machine(1, 1)))

    async def rows() -> list[Machine]:
        return [row async for row in store.machines()]

    reads: tuple[Callable[[], Coroutine[Any, Any, object]], ...] = (
        lambda: store.audit_entries(AuditQuery(limit=1)),
        lambda: store.history(HistoryQuery()),
        lambda: store.prune_audit(0.0, 1),
        lambda: store.bans(),
        lambda: store.tokens(),
        rows,
    )
    for read, turns, moment in product(reads, range(8), (0.0, 0.0003)):
        task = asyncio.create_task(read())
        for _ in range(turns):
            await asyncio.sleep(moment)
        task.cancel()
        await asyncio.wait([task])
        assert await store.transact(lambda transaction: transaction.machine("1")) is not None


def test_a_row_prints_no_token() -> None:
    assert "secret" not in repr(replace(machine(1, 1), unique_token_digest=b"secret"))


@pytest.mark.parametrize("late", [1.0, 1000.0])
async def test_an_older_note_does_not_replace_a_newer_one(store: Store, late: float) -> None:
    """A note may wait for long while the database is unavailable."""
    await store.transact(work_of("insert", machine(1, 1)))
    now = 5.0 + late
    newer = LastSeen(endpoint="192.0.2.7:2", seen_at=now, source="192.0.2.7", goodbye_at=now)
    await store.transact(lambda transaction: transaction.note({"1": newer}, now))
    await store.transact(lambda transaction: transaction.note({"1": LastSeen(endpoint="192.0.2.7:1", seen_at=5.0)}, now))
    [row] = [row async for row in store.machines()]
    assert (row.last_endpoint, row.seen_at, row.last_source, row.goodbye_at) == ("192.0.2.7:2", now, "192.0.2.7", now)


async def test_a_note_replaces_times_of_a_clock_that_was_ahead(store: Store) -> None:
    await store.transact(work_of("insert", machine(1, 1)))
    ahead = LastSeen(endpoint="192.0.2.7:2", seen_at=1e9, handshake_at=1e9, goodbye_at=1e9)
    await store.transact(lambda transaction: transaction.note({"1": ahead}, 1e9))
    seen = LastSeen(endpoint="192.0.2.7:1", seen_at=5.0, handshake_at=4.0)
    await store.transact(lambda transaction: transaction.note({"1": seen}, 5.0))
    [row] = [row async for row in store.machines()]
    assert (row.last_endpoint, row.seen_at, row.last_handshake_at, row.goodbye_at) == ("192.0.2.7:1", 5.0, 4.0, None)


def claim(number: int, machine_id: str = "1", *, created_at: float = 0.0) -> Claim:
    return Claim(
        id=f"claim-{number}",
        machine_id=machine_id,
        public_key=PublicKey(bytes([100 + number]) * 32),
        virtual_address=IPv6Address(1000 + number),
        created_at=created_at,
        expires_at=created_at + 60,
    )


async def test_a_row_may_be_asked_for_by_id_while_it_is_being_read_by_another_column(store: Store) -> None:
    await store.transact(work_of("insert", machine(1, 1)))

    async def late(transaction: Transaction, turns: int) -> Machine | None:
        for _ in range(turns):
            await asyncio.sleep(0)
        row = await transaction.machine("1")
        for _ in range(5):  # the works' shared queries go on
            await transaction.machine("unknown")
            await asyncio.sleep(0.001)
        return row

    for turns in range(60):
        early = store.transact(lambda transaction: transaction.machine_by_uuid("uuid-1"))
        found = await asyncio.gather(early, store.transact(partial(late, turns=turns)))
        assert [row and row.id for row in found] == ["1", "1"]


async def test_a_row_has_several_claims_which_are_removed_with_it(store: Store) -> None:
    one, two = claim(1, created_at=1.0), claim(2, created_at=2.0)

    async def work(transaction: Transaction) -> None:
        await transaction.insert(machine(1, 1))
        await transaction.put_claim(one)
        await transaction.put_claim(two)
        assert await transaction.claim_by_key(one.public_key) == one

    async with store.changes() as changes:
        await store.transact(work)
        assert list(await store.all_claims()) == [one, two]
        assert list(await store.transact(lambda transaction: transaction.claims("1"))) == [one, two]
        assert await store.transact(lambda transaction: transaction.claim_by_key(two.public_key)) == two
        with pytest.raises(UniqueViolationError):
            await store.transact(lambda transaction: transaction.put_claim(replace(claim(3), public_key=one.public_key)))
        await store.transact(lambda transaction: transaction.delete_claim(one))
        await store.transact(lambda transaction: transaction.delete("1"))
        assert list(await store.all_claims()) == []
        found = [await anext(changes) for _ in range(6)]
    told = [(change.claim.id, change.is_over) for change in found if isinstance(change, ClaimChanged)]
    assert told == [("claim-1", False), ("claim-2", False), ("claim-1", True), ("claim-2", True)]


async def test_claims_are_rolled_back(store: Store) -> None:
    async def work(transaction: Transaction) -> None:
        await transaction.put_claim(claim(2))
        await transaction.delete_claim(claim(1))
        raise StoreError("no")

    await store.transact(work_of("insert", machine(1, 1)))
    await store.transact(lambda transaction: transaction.put_claim(claim(1)))
    with pytest.raises(StoreError):
        await store.transact(work)
    assert list(await store.all_claims()) == [claim(1)]


async def test_only_accepted_machines_own_their_uuid(store: Store) -> None:
    pending = replace(machine(2, 1, overlay=2), admission=MachineAdmission.PENDING)
    await store.transact(work_of("insert", machine(1, 1, overlay=1)))
    await store.transact(work_of("insert", pending))
    found = await store.transact(lambda transaction: transaction.machine_by_uuid("uuid-1"))
    assert found is not None
    assert found.id == "1"
    with pytest.raises(UniqueViolationError):
        await store.transact(work_of("update", replace(pending, admission=MachineAdmission.ACCEPTED)))
    await store.transact(lambda transaction: transaction.delete("1"))
    await store.transact(work_of("update", replace(pending, admission=MachineAdmission.ACCEPTED)))
