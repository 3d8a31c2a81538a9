"""Join tokens with a limit of machines at a time: what counts, what makes room, and that the limit holds."""

import itertools
from contextlib import suppress
from dataclasses import replace

import anyio
import pytest
from grpclib import GRPCError, Status
from hypothesis import given, settings
from hypothesis import strategies as st

from siderolink.common.errors import ConfigurationError, SideroLinkError
from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import TokenState
from tests.support.manager import TOKEN, FakeMachine, Manager, managed, new_key, tokens_of
from tests.support.stores import KINDS
from tests.unit.server.test_join_tokens import managers

pytestmark = pytest.mark.anyio

FULL = Status.RESOURCE_EXHAUSTED
UNIQUE = '{"Fingerprint":"aa","Token":"own"}'


async def joined(manager: Manager, text: str, machine: FakeMachine | None = None) -> FakeMachine:
    machine = machine or FakeMachine()
    await manager.join(machine, join_token=text)
    await manager.handshake(machine)
    return machine


async def remove(manager: Manager, machine: FakeMachine) -> None:
    row = await manager.machines.find(machine.node_uuid)
    assert row is not None
    await manager.machines.remove(row.id)


async def test_a_machine_that_is_removed_makes_room_for_another_one() -> None:
    manager, tokens = managed()
    text = (await tokens.create("few", max_machines=2)).secret
    first, _ = await joined(manager, text), await joined(manager, text)
    status = await tokens.get("few")
    assert (status.state, status.machines, status.uses) == (TokenState.FULL, 2, 2)
    assert (await manager.refuses(FakeMachine(), join_token=text))[0] is FULL
    assert manager.service.refusals[JoinRefusal.TOKEN_FULL] == 1
    await manager.pass_time(120)
    await joined(manager, text, replace(first, key=new_key()))  # its own row does not count as another machine
    await remove(manager, first)
    assert (await tokens.get("few")).state is TokenState.ACTIVE
    await joined(manager, text)
    assert (await manager.refuses(FakeMachine(), join_token=text))[0] is FULL


async def test_a_machine_that_never_shakes_hands_counts_until_it_is_forgotten() -> None:
    manager, tokens = managed()
    text = (await tokens.create("one", max_machines=1)).secret
    await manager.join(FakeMachine(), join_token=text)
    assert (await manager.refuses(FakeMachine(), join_token=text))[0] is FULL
    await manager.pass_time(700)
    await joined(manager, text)


async def test_a_machine_that_joins_by_another_token_counts_for_that_one() -> None:
    manager, tokens = managed()
    one, two = [(await tokens.create(name, max_machines=1)).secret for name in ("one", "two")]
    machine = await joined(manager, one)
    await manager.pass_time(120)
    await joined(manager, two, replace(machine, key=new_key()))
    assert [(await tokens.get(name)).machines for name in ("one", "two")] == [0, 1]
    await joined(manager, one)
    await manager.pass_time(120)
    again = replace(machine, key=new_key())
    assert (await manager.refuses(again, join_token=one))[0] is FULL
    await joined(manager, TOKEN, again)  # the given token has no limit
    assert [(await tokens.get(name)).machines for name in ("one", "two")] == [1, 0]


async def test_a_unique_token_admits_a_machine_whose_join_token_is_full() -> None:
    """It stays with its previous token until the new one has room; then it counts there."""
    manager, tokens = managed()
    one, two = [(await tokens.create(name, max_machines=1)).secret for name in ("one", "two")]
    machine = await joined(manager, one, FakeMachine(unique_token=UNIQUE))
    other = await joined(manager, two)
    await joined(manager, two, replace(machine, key=new_key()))
    assert [(await tokens.get(name)).machines for name in ("one", "two")] == [1, 1]
    await remove(manager, other)
    await joined(manager, two, replace(machine, key=new_key()))
    assert [(await tokens.get(name)).machines for name in ("one", "two")] == [0, 1]
    assert (await manager.refuses(FakeMachine(), join_token=two))[0] is FULL


async def test_an_unproven_claim_returns_its_place() -> None:
    manager, tokens = managed()
    text = (await tokens.create("one", max_machines=1)).secret
    machine = await joined(manager, TOKEN)
    await manager.pass_time(120)
    await manager.join(replace(machine, key=new_key()), join_token=text)
    assert (await manager.refuses(FakeMachine(), join_token=text))[0] is FULL
    await manager.pass_time(61)
    await joined(manager, text)


@pytest.mark.parametrize("limit", ["max_uses", "max_machines"])
async def test_a_limit_that_is_lowered_holds(limit: str) -> None:
    """Places beyond the lowered limit may be in use, and still count."""
    manager, tokens = managed()
    text = (await tokens.create("many", **{limit: 50})).secret  # type: ignore[arg-type]
    for _ in range(3):
        await joined(manager, text)
    await tokens.update("many", **{limit: 3})  # type: ignore[arg-type]
    with pytest.raises(GRPCError):
        await manager.join(FakeMachine(), join_token=text)
    await tokens.update("many", **{limit: 4})  # type: ignore[arg-type]
    await joined(manager, text)
    with pytest.raises(GRPCError):
        await manager.join(FakeMachine(), join_token=text)
    await tokens.update("many", **{limit: 0})  # type: ignore[arg-type]
    await joined(manager, text)


async def test_invalid_limits_are_refused() -> None:
    _, tokens = managed()
    with pytest.raises(ConfigurationError, match="not both"):
        await tokens.create("both", max_uses=2, max_machines=2)
    with pytest.raises(ConfigurationError, match="not both"):
        await tokens.create("both", one_time=True, max_machines=2)
    with pytest.raises(ConfigurationError, match="max_machines must be 1 to"):
        await tokens.create("none", max_machines=0)
    await tokens.create("uses", max_uses=2)
    for made_without in (await tokens.create("open"), await tokens.create("used", max_uses=3)):
        with pytest.raises(SideroLinkError, match="created without max_machines"):
            await tokens.update(made_without.status.token.name, max_machines=2)


@pytest.mark.parametrize("kind", KINDS)
async def test_concurrent_joins_do_not_exceed_the_tokens_limit_of_machines(kind: str) -> None:
    """At two servers at once where the store is shared, before and after some of them are removed."""
    async with managers(kind, 2) as shared:
        tokens = tokens_of(shared[0])
        text = (await tokens.create("few", max_machines=5)).secret
        for manager in shared:
            await manager.links.known.load_tokens(manager.store)

        async def crowd() -> list[tuple[FakeMachine, Manager]]:
            admitted = []

            async def join(machine: FakeMachine, manager: Manager) -> None:
                with suppress(GRPCError):
                    await manager.join(machine, join_token=text)
                    admitted.append((machine, manager))

            async with anyio.create_task_group() as tasks:
                for machine, manager in zip((FakeMachine() for _ in range(24)), itertools.cycle(shared), strict=False):
                    tasks.start_soon(join, machine, manager)
            return admitted

        admitted = await crowd()
        assert len(admitted) == 5
        for machine, manager in admitted[:2]:
            await manager.handshake(machine)
            await remove(manager, machine)
        assert len(await crowd()) == 2
        assert (await tokens.get("few")).machines == 5


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["join", "other", "prove", "rekey", "remove", "wait"])), max_size=25)
)
@settings(max_examples=60, deadline=None)
def test_the_limit_holds_whatever_happens(steps: list[tuple[int, str]]) -> None:
    """A token never has more rows than its limit, and has room as soon as it has fewer."""

    async def run() -> None:
        manager, tokens = managed()
        texts = {"join": (await tokens.create("two", max_machines=2)).secret, "rekey": "", "other": TOKEN}
        texts["rekey"] = texts["join"]
        token_id = (await tokens.get("two")).token.id
        machines = {number: FakeMachine() for number in range(4)}

        async def rows() -> int:
            return len([row async for row in manager.store.machines() if row.token_id == token_id])

        for number, step in steps:
            row = await manager.machines.find(machines[number].node_uuid)
            if step == "wait":
                await manager.pass_time(300)
            elif step == "remove" and row is not None:
                await manager.machines.remove(row.id)
            elif step == "prove" and manager.links.by_key(machines[number].key) is not None:
                await manager.handshake(machines[number])
            elif step in texts:
                if step == "rekey":
                    machines[number] = replace(machines[number], key=new_key())
                with suppress(GRPCError):
                    await manager.join(machines[number], join_token=texts[step])
            assert await rows() <= (await tokens.get("two")).machines <= 2
        await manager.pass_time(61)
        assert (await tokens.get("two")).machines == await rows()

    anyio.run(run)
