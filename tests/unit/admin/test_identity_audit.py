"""What the audit says of changes of machines' identities; rejoins are not in it."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from siderolink.server.store import AuditEntry, AuditQuery
from tests.support.manager import FakeMachine, Manager
from tests.support.stores import KINDS, opened

pytestmark = pytest.mark.anyio

UNIQUE = '{"Fingerprint":"","Token":"5e6ac9a1-6c4b-4c39-8e5d-9a7f5b0d3c21"}'


async def audited(manager: Manager) -> list[AuditEntry]:
    return list(await manager.store.audit_entries(AuditQuery(newest_first=False)))


@pytest.fixture(params=KINDS)
async def manager(request: pytest.FixtureRequest) -> AsyncIterator[Manager]:
    async with opened(request.param) as store:
        yield Manager(store=store)


async def test_a_binding_is_audited_once_and_rejoins_are_not(manager: Manager) -> None:
    machine = FakeMachine()
    await manager.join(machine, node_unique_token=UNIQUE)
    assert await audited(manager) == []
    await manager.handshake(machine)
    (entry,) = await audited(manager)
    assert (entry.action, entry.actor.name, entry.object_name) == ("machine.bind", "machine", machine.node_uuid)
    assert (entry.before, entry.after) == ({"has_unique_token": False}, {"has_unique_token": True})
    assert "5e6ac9a1" not in entry.to_json()
    again = replace(machine, key=FakeMachine().key)
    for one in (machine, again, again):
        await manager.join(one, node_unique_token=UNIQUE)
        await manager.handshake(one)
    assert (await manager.row(machine)).public_key == again.key
    assert len(await audited(manager)) == 1


async def test_a_takeover_without_a_token_is_audited_with_its_basis(manager: Manager) -> None:
    machine = FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(61)
    other = replace(machine, key=FakeMachine().key)
    await manager.join(other)
    assert await audited(manager) == [], "a claim changes nothing"
    await manager.handshake(other)
    (entry,) = await audited(manager)
    assert entry.action == "machine.take_over"
    assert (entry.before, entry.after) == (
        {"public_key": machine.key.encode()},
        {"public_key": other.key.encode(), "basis": "silence"},
    )
