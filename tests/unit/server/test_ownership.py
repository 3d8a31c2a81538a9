"""Which server owns a link: an epoch that only rises, in each store; and between two servers, in both orders."""

from dataclasses import replace

import anyio
import pytest

from siderolink.common.errors import StoreError
from siderolink.common.keys import PublicKey
from siderolink.server.store import FleetServer, FleetServerChanged, Ownership, OwnershipTaken, Store, Transaction
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import STATE_KEY, cluster
from tests.unit.server.test_store import machine, store, work_of

__all__ = ["store"]

pytestmark = pytest.mark.anyio

KEY = PublicKey(bytes([1]) * 32)


def owned_by(server_id: str, **fields: object) -> Ownership:
    return replace(Ownership(machine_id="1", server_id=server_id, public_key=KEY, heard_at=1.0), **fields)  # type: ignore[arg-type]


async def take(store: Store, ownership: Ownership) -> Ownership:
    return await store.transact(lambda transaction: transaction.ownership.take(ownership))


async def note(store: Store, ownership: Ownership) -> bool:
    return await store.transact(lambda transaction: transaction.ownership.note(ownership))


async def owner(store: Store) -> Ownership | None:
    return await store.transact(lambda transaction: transaction.ownership.of("1"))


async def test_the_epoch_rises_and_a_server_that_lost_a_link_writes_nothing(store: Store) -> None:
    assert await owner(store) is None
    async with store.changes() as changes:
        first = await take(store, owned_by("a"))
        assert await note(store, replace(first, rx=5, stamp=bytes([7]) * 12, heard_at=3.0))
        second = await take(store, owned_by("b", heard_at=4.0))
        assert not await note(store, replace(first, rx=6))
        again = await take(store, owned_by("a", heard_at=5.0))
        assert not await note(store, replace(first, rx=7))  # what it wrote in an earlier epoch does not count in this one
        assert not await note(store, second)
        assert [one.epoch for one in (first, second, again)] == [1, 2, 3]
        assert again.stamp == bytes([7]) * 12  # a successor begins above it
        assert await owner(store) == again
        assert [await anext(changes) for _ in range(3)] == [OwnershipTaken(ownership=one) for one in (first, second, again)]


async def test_ownership_is_removed_with_its_row_and_rolled_back_with_its_transaction(store: Store) -> None:
    async def fail(transaction: Transaction) -> None:
        await transaction.ownership.take(owned_by("b"))
        await transaction.ownership.put_server(FleetServer(id="b", heartbeat_at=1.0))
        raise StoreError("no")

    await store.transact(work_of("insert", machine(1, 1)))
    taken = await take(store, owned_by("a"))
    with pytest.raises(StoreError):
        await store.transact(fail)
    assert await owner(store) == taken
    assert list(await store.transact(lambda transaction: transaction.ownership.servers())) == []
    await store.transact(lambda transaction: transaction.delete("1"))
    assert await owner(store) is None


async def test_servers_are_listed_and_heartbeats_make_no_changes(store: Store) -> None:
    server = FleetServer(id="a", endpoints=("192.0.2.1:51820", "[2001:db8::1]:51820"), heartbeat_at=1.0, schema=8)
    other = FleetServer(id="b", heartbeat_at=2.0, is_draining=True)
    draining = replace(server, heartbeat_at=9.0, is_draining=True)

    async def put(one: FleetServer) -> None:
        await store.transact(lambda transaction: transaction.ownership.put_server(one))

    async with store.changes() as changes:
        for one in (server, other, replace(server, heartbeat_at=8.0, clock_offset=0.1), draining):
            await put(one)
        found = await store.transact(lambda transaction: transaction.ownership.servers())
        assert {one.id: one for one in found} == {"a": draining, "b": other}
        await store.transact(lambda transaction: transaction.ownership.delete_server("b"))
        assert [await anext(changes) for _ in range(4)] == [
            FleetServerChanged(server=server),
            FleetServerChanged(server=other),
            FleetServerChanged(server=draining),
            FleetServerChanged(server=other, is_gone=True),
        ]
    assert server.is_alive(10.0, 9.0)
    assert not server.is_alive(10.1, 9.0)


@pytest.mark.parametrize("is_noted_first", [True, False])
async def test_concurrent_notes_and_takeovers_on_two_servers_are_serialized(is_noted_first: bool) -> None:
    """The old owner writes while another server takes the link: the write comes first, or is refused."""
    with cluster().database() as name:
        url = cluster().url(name)
        async with PostgresStore.open(url, key=STATE_KEY) as one, PostgresStore.open(url, key=STATE_KEY) as two:
            first = await take(one, owned_by("a"))
            read, go_on = anyio.Event(), anyio.Event()
            noted: list[bool] = []

            async def slow(transaction: Transaction) -> bool:
                is_stored = await transaction.ownership.note(replace(first, rx=5, stamp=bytes([5]) * 12))
                read.set()
                if not is_noted_first:
                    await go_on.wait()
                return is_stored

            async def write() -> None:
                noted.append(await one.transact(slow))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(write)
                await read.wait()
                if is_noted_first:
                    while not noted:
                        await anyio.sleep(0.01)
                taken = await take(two, owned_by("b"))
                go_on.set()
            assert noted == [is_noted_first]
            assert taken.epoch == 2
            assert taken.stamp == (bytes([5]) * 12 if is_noted_first else bytes(12))
            assert await owner(one) == taken


async def test_of_many_that_take_a_link_at_once_each_has_an_epoch_of_its_own() -> None:
    with cluster().database() as name:
        url = cluster().url(name)
        epochs: list[int] = []

        async def compete(store: Store, server_id: str) -> None:
            epochs.append((await take(store, owned_by(server_id))).epoch)

        async with PostgresStore.open(url, key=STATE_KEY) as one, PostgresStore.open(url, key=STATE_KEY) as two:
            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(compete, one if number % 2 else two, str(number))
            found = await owner(one)
        assert sorted(epochs) == list(range(1, 11))
        assert found is not None
        assert found.epoch == 10
