"""What a store tells those who ask for a part: readers of its feed, and a call about several bans."""

from functools import partial
from ipaddress import IPv6Address

import pytest

from siderolink.common.keys import PrivateKey
from siderolink.server.store import Ban, BanChanged, BanKind, Machine, Transaction
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio


async def add(number: int, transaction: Transaction) -> None:
    row = Machine(
        id=str(number),
        node_uuid=f"uuid-{number}",
        public_key=PrivateKey.generate().public_key(),
        overlay_address=IPv6Address(number),
        created_at=0.0,
        joined_at=0.0,
    )
    await transaction.insert(row)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reader_gets_only_the_changes_that_it_wants(kind: str) -> None:
    async with (
        opened(kind, feed_limit=2) as store,
        store.changes(lambda change: isinstance(change, BanChanged)) as changes,
    ):
        for number in range(3):  # more than the limit
            await store.transact(partial(add, number))
        ban = Ban(value="uuid-9")
        await store.transact(lambda transaction: transaction.set_banned(ban, True))
        assert await anext(changes) == BanChanged(ban=ban, banned=True)


@pytest.mark.parametrize("kind", KINDS)
async def test_one_of_several_bans_is_found(kind: str) -> None:
    one, other, new = Ban(value="one"), Ban(value="other"), Ban(kind=BanKind.KEY, value="one")

    async def work(transaction: Transaction) -> None:
        assert not await transaction.is_banned()
        assert not await transaction.is_banned(other, new)
        assert await transaction.is_banned(other, new, one)
        await transaction.set_banned(new, True)
        await transaction.set_banned(one, False)
        assert await transaction.is_banned(other, new)
        assert not await transaction.is_banned(other, one)

    async with opened(kind) as store:
        await store.transact(lambda transaction: transaction.set_banned(one, True))
        await store.transact(work)
