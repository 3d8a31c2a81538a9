"""Join tokens and their uses in each store."""

from dataclasses import replace

import anyio
import pytest

from siderolink.common.errors import StoreError
from siderolink.server.store import (
    JoinToken,
    Store,
    TokenChanged,
    TokenColumn,
    TokenKind,
    TokenUse,
    Transaction,
    TunnelSetting,
    UniqueViolationError,
)
from siderolink.server.store.tokens import DEFAULT_TOKEN
from tests.unit.server.test_store import machine, store

__all__ = ["store"]

pytestmark = pytest.mark.anyio


def token(number: int, **fields: object) -> JoinToken:
    made = JoinToken(id=f"t{number}", name=f"name {number}", digest=bytes([number]) * 32, secret=b"sealed", created_at=1.0)
    return replace(made, **fields)  # type: ignore[arg-type]


def use(slot: int, machine_id: str, *, at: float = 10.0, expires_at: float | None = None) -> TokenUse:
    return TokenUse(token_id="t1", slot=slot, machine_id=machine_id, reserved_at=at, expires_at=expires_at)


async def put(store: Store, *tokens: JoinToken) -> None:
    async def work(transaction: Transaction) -> None:
        for one in tokens:
            await transaction.tokens.put(one)

    await store.transact(work)


async def put_use(store: Store, wanted: TokenUse) -> bool:
    """False if its slot is taken."""
    try:
        await store.transact(lambda transaction: transaction.tokens.put_use(wanted))
    except UniqueViolationError:
        return False
    return True


async def uses(store: Store, token_id: str = "t1") -> dict[str, TokenUse]:
    found = await store.transact(lambda transaction: transaction.tokens.uses(token_id))
    return {one.machine_id: one for one in found}


async def test_a_token_is_found_by_all_that_is_unique_in_it(store: Store) -> None:
    whole = token(
        1,
        kind=TokenKind.V2,
        provider="p",
        note="n",
        created_by="x",
        expires_at=2.0,
        revoked_at=3.0,
        max_uses=4,
        bound_uuid="u",
        tunnel=TunnelSetting.FORCE,
        labels={"b": "ü", "a": ""},
        is_default=True,
    )
    await put(store, whole, token(2))

    async def work(transaction: Transaction) -> None:
        for column, value in [
            (TokenColumn.ID, "t1"),
            (TokenColumn.NAME, "name 1"),
            (TokenColumn.DIGEST, bytes([1]) * 32),
            (TokenColumn.PROVIDER, "p"),
            DEFAULT_TOKEN,
        ]:
            assert await transaction.tokens.find(column, value) == whole
        assert await transaction.tokens.find(TokenColumn.PROVIDER, "q") is None

    await store.transact(work)
    assert await store.tokens() == [whole, token(2)]
    assert await store.tokens(after="name 1", limit=5) == [token(2)]
    assert await store.tokens(limit=1) == [whole]


@pytest.mark.parametrize(
    "repeated",
    [{"name": "name 1"}, {"digest": bytes([1]) * 32}, {"provider": "p"}, {"is_default": True}],
    ids=lambda fields: str(next(iter(fields))),
)
async def test_unique_values_are_not_accepted_twice(store: Store, repeated: dict[str, object]) -> None:
    await put(store, token(1, provider="p", is_default=True))
    with pytest.raises(UniqueViolationError) as caught:
        await put(store, token(2, **repeated))
    assert caught.value.column == next(iter(repeated))
    assert [one.id for one in await store.tokens()] == ["t1"]


async def test_a_value_freed_by_one_token_may_be_used_by_another_in_the_same_transaction(store: Store) -> None:
    await put(store, token(1, is_default=True, provider="p"), token(2))
    await put(store, token(1), token(2, is_default=True, provider="p"))
    found = await store.transact(lambda transaction: transaction.tokens.find(*DEFAULT_TOKEN))
    assert found == token(2, is_default=True, provider="p")


async def test_changes_of_tokens_are_reported_after_commit(store: Store) -> None:
    async with store.changes() as changes:

        async def fails(transaction: Transaction) -> None:
            await transaction.tokens.put(token(3))
            await transaction.tokens.put_use(use(0, "m"))
            raise StoreError("undo this")

        with pytest.raises(StoreError):
            await store.transact(fails)
        await put(store, token(1, labels={"a": "b"}))
        await put_use(store, use(0, "m"))
        await store.transact(lambda transaction: transaction.tokens.delete("t1"))
        with anyio.fail_after(30):
            told = [await anext(changes), await anext(changes)]
    changed = token(1, labels={"a": "b"})
    assert told == [TokenChanged(token=changed), TokenChanged(token=changed, is_gone=True)]
    assert await store.tokens() == []
    assert await uses(store) == {}


async def test_a_use_of_a_token_belongs_to_one_machine_until_it_is_returned(store: Store) -> None:
    await put(store, token(1, max_uses=2))
    assert await put_use(store, use(0, "a", expires_at=20.0))
    assert not await put_use(store, use(0, "b", at=19.0))
    assert await put_use(store, use(0, "b", at=20.0))
    assert not await put_use(store, use(0, "a", at=30.0))
    assert await put_use(store, use(1, "a", at=30.0))
    assert await put_use(store, replace(use(1, "a", at=30.0), spent_at=31.0))
    found = await uses(store)
    assert {machine_id: (one.slot, one.spent_at) for machine_id, one in found.items()} == {"a": (1, 31.0), "b": (0, None)}


async def test_an_unspent_use_goes_with_its_row_and_a_spent_one_stays(store: Store) -> None:
    for number, spent_at in ((1, None), (2, 5.0)):
        row = replace(machine(number, number, overlay=number), token_id="t1", has_reserved_use=True)
        reserved = replace(use(number, str(number)), spent_at=spent_at)

        async def join(transaction: Transaction, row=row, reserved=reserved) -> None:  # type: ignore[no-untyped-def]
            await transaction.insert(row)
            await transaction.tokens.put_use(reserved)

        await store.transact(join)
        await store.transact(lambda transaction, row=row: transaction.delete(row.id))  # type: ignore[misc]
    assert list(await uses(store)) == ["2"]


async def test_concurrent_transactions_take_each_use_once(store: Store) -> None:
    """Transactions fail only if no place is free."""
    await put(store, token(1, max_uses=5))
    taken: list[int] = []

    async def take(number: int) -> None:
        async def work(transaction: Transaction) -> int | None:
            used = {one.slot for one in await transaction.tokens.uses("t1")}
            free = [slot for slot in range(5) if slot not in used]
            if not free:
                return None
            await transaction.tokens.put_use(use(free[number % len(free)], str(number)))
            return free[number % len(free)]

        slot = await store.transact(work)
        if slot is not None:
            taken.append(slot)

    async with anyio.create_task_group() as tasks:
        for number in range(40):
            tasks.start_soon(take, number)
    assert sorted(taken) == list(range(5))
    assert sorted(one.slot for one in (await uses(store)).values()) == list(range(5))
