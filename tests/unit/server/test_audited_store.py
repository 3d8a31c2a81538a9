"""What stores keep for administration: names, the grounds of bans, principals, and the audit."""

from dataclasses import replace

import anyio
import pytest

from siderolink.common.errors import StoreError
from siderolink.server.store import (
    Actor,
    AuditAdded,
    AuditEntry,
    AuditQuery,
    Ban,
    BanGrounds,
    Principal,
    PrincipalChanged,
    Role,
    Store,
    Transaction,
    TunnelSetting,
    UniqueViolationError,
)
from siderolink.server.store.audit import ForwardGrant
from tests.unit.server.test_store import machine, store

pytestmark = pytest.mark.anyio

__all__ = ["store"]


async def test_a_name_belongs_to_one_machine(store: Store) -> None:
    async def work(transaction: Transaction) -> None:
        await transaction.insert(replace(machine(1, 1, overlay=1), name="edge", labels={"rack": "7"}, note="north"))
        with pytest.raises(UniqueViolationError) as caught:
            await transaction.insert(replace(machine(2, 2, overlay=2), name="edge"))
        assert caught.value.column == "name"
        await transaction.insert(machine(2, 2, overlay=2))
        await transaction.insert(machine(3, 3, overlay=3))

    async def swap(transaction: Transaction) -> None:
        one, two = await transaction.machine("1"), await transaction.machine("2")
        assert one is not None
        assert two is not None
        await transaction.update(replace(one, name=None))
        await transaction.update(replace(two, name="edge", tunnel_setting=TunnelSetting.FORBID))

    await store.transact(work)
    found = await store.transact(lambda transaction: transaction.machine_by_name("edge"))
    assert found is not None
    assert (found.id, dict(found.labels), found.note) == ("1", {"rack": "7"}, "north")
    await store.transact(swap)
    found = await store.transact(lambda transaction: transaction.machine_by_name("edge"))
    assert found is not None
    assert (found.id, found.tunnel_setting) == ("2", TunnelSetting.FORBID)


async def test_a_repeated_ban_keeps_its_first_reason(store: Store) -> None:
    ban, grounds = Ban(value="uuid-9"), BanGrounds(reason="stolen", created_by="alice", created_at=5.0)
    await store.transact(lambda transaction: transaction.set_banned(ban, True, grounds))
    await store.transact(lambda transaction: transaction.set_banned(ban, True, BanGrounds(reason="again")))
    assert await store.bans() == {ban: grounds}
    await store.transact(lambda transaction: transaction.set_banned(ban, False))
    assert await store.bans() == {}


def entry(number: int, action: str = "machine.rename", actor: str = "alice") -> AuditEntry:
    who = Actor(name=actor, role=Role.OPERATOR, source="192.0.2.7")
    return AuditEntry(
        at=float(number), actor=who, action=action, object_kind="machine", object_id=str(number), after={"name": "n%_"}
    )


async def test_audit_entries_are_added_with_their_transaction_or_not_at_all(store: Store) -> None:
    async def fails(transaction: Transaction) -> None:
        await transaction.audit(entry(1))
        raise StoreError("undo this")

    async def adds(transaction: Transaction) -> None:
        await transaction.insert(machine(1, 1))
        await transaction.audit(entry(2))
        await transaction.audit(entry(3, action="ban.add"))

    async with store.changes() as changes:
        with pytest.raises(StoreError):
            await store.transact(fails)
        await store.transact(adds)
        await store.transact(lambda transaction: transaction.audit(entry(4, actor="bob")))
        told = [change for change in [await anext(changes) for _ in range(4)] if isinstance(change, AuditAdded)]
    found = await store.audit_entries(AuditQuery())
    assert [one.at for one in found] == [4.0, 3.0, 2.0]
    assert [change.entry for change in told] == list(reversed(found))
    assert replace(found[-1], seq=0) == entry(2)
    last = found[0].seq
    assert [one.at for one in await store.audit_entries(AuditQuery(actor="bob"))] == [4.0]
    assert [one.at for one in await store.audit_entries(AuditQuery(action="machine.", object="2"))] == [2.0]
    assert await store.audit_entries(AuditQuery(action="machine%")) == []
    assert [one.at for one in await store.audit_entries(AuditQuery(since=3.0, until=4.0))] == [3.0]
    assert [one.at for one in await store.audit_entries(AuditQuery(before_seq=last, limit=1))] == [3.0]
    assert [one.at for one in await store.audit_entries(AuditQuery(newest_first=False, after_seq=found[2].seq))] == [3.0, 4.0]

    assert await store.prune_audit(4.0, 1) == 1
    assert [one.at for one in await store.audit_entries(AuditQuery())] == [4.0, 3.0]
    assert await store.prune_audit(100.0, 100) == 2
    await store.transact(lambda transaction: transaction.audit(entry(5)))
    assert (await store.audit_entries(AuditQuery()))[0].seq > last, "numbers are never used again"


GRANTS = (ForwardGrant("a1b2"), ForwardGrant("c3d4", 50000))


async def test_principals_are_stored_by_name(store: Store) -> None:
    one = Principal(id="1", name="ci", role=Role.VIEWER, key_digest=b"1" * 32, created_at=1.0, grants=GRANTS)

    async def clash(transaction: Transaction) -> None:
        with pytest.raises(UniqueViolationError):
            await transaction.put_principal(replace(one, id="2", key_digest=b"2" * 32))
        await transaction.put_principal(replace(one, id="2", name="ops", key_digest=b"2" * 32))

    async with store.changes() as changes:
        await store.transact(lambda transaction: transaction.put_principal(one))
        await store.transact(clash)
        await store.note_principals({"1": (7.0, "192.0.2.7"), "9": (1.0, "")})
        found = {found.name: found for found in await store.transact(lambda transaction: transaction.principals())}
        assert set(found) == {"ci", "ops"}
        assert found["ci"] == replace(one, last_used_at=7.0, last_source="192.0.2.7")
        await store.transact(lambda transaction: transaction.delete_principal("1"))
        names = [found.name for found in await store.transact(lambda transaction: transaction.principals())]
        assert names == ["ops"]
        assert [await anext(changes) for _ in range(3)] == [PrincipalChanged(principal_id=name) for name in ("1", "2", "1")]


async def test_a_hundred_writers_at_once_lose_no_audit_entry(store: Store) -> None:
    async def work(number: int) -> None:
        await store.transact(lambda transaction: transaction.audit(entry(number)))

    async with anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(work, number)
    found = await store.audit_entries(AuditQuery(limit=200))
    assert sorted(one.at for one in found) == [float(number) for number in range(100)]
    assert len({one.seq for one in found}) == 100
