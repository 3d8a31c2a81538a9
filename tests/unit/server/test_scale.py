"""What a machine and an event cost among many, counted in calls and bytes, not in seconds. The figures: benchmarks/scale.py."""

import gc
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import FrameType
from typing import TypeVar

import pytest

from siderolink.server import Machine, MemoryStore
from siderolink.server.events import LeaveReason
from siderolink.server.store.ownership import Ownership
from tests.support.crowd import Crowd, Member, open_crowd
from tests.support.fake_device import VirtualClock
from tests.support.manager import FakeMachine, Manager
from tests.support.several import membership, owners

pytestmark = pytest.mark.anyio

T = TypeVar("T")

FEW, MANY = 10, 120
EVENTS = 40


async def calls_of(act: Callable[[T], Awaitable[object]], members: Sequence[T]) -> int:
    """How many Python functions run while `act` is done with each."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    for member in members:
        sys.setprofile(note)
        try:
            await act(member)
        finally:
            sys.setprofile(None)
    return count


async def costs(crowd: Crowd) -> dict[str, int]:
    """Calls for events of each kind, spread over all machines."""
    members = [crowd.members[number * len(crowd.members) // EVENTS] for number in range(EVENTS)]
    packets = [crowd.packet(member) for member in members]

    async def hear(member: Member) -> None:
        crowd.hear(member, packets.pop(0))

    async def look(_: Member) -> None:
        crowd.device.engine.next_deadline()
        crowd.device.engine.handle_timers(time.clock_gettime(time.CLOCK_BOOTTIME))

    new = [crowd.new_member() for _ in range(EVENTS)]
    return {
        "packet": await calls_of(hear, members),
        "timer": await calls_of(look, members),
        "join": await calls_of(crowd.join, new),
        "leave": await calls_of(crowd.leave, new),
    }


async def test_the_cost_of_events_does_not_grow_with_the_machines() -> None:
    async with open_crowd(FEW) as few, open_crowd(MANY) as many:
        before, after = await costs(few), await costs(many)
    # a heap with twelve times as many entries takes four more steps
    assert {kind: after[kind] for kind in after if after[kind] > 1.3 * before[kind] + 4 * EVENTS} == {}


async def test_a_join_takes_few_calls() -> None:
    async with open_crowd(FEW) as crowd:
        new = [crowd.new_member() for _ in range(EVENTS)]
        assert await calls_of(crowd.join, new) / EVENTS < 328


async def follow_costs(count: int) -> dict[str, int]:
    """Calls of one server for changes of each kind that another server of the store made, with so many rows."""
    store, clock = MemoryStore(), VirtualClock()
    changing, following = (Manager(store=store, time=clock, server_id=name) for name in ("a", "b"))
    for manager in (changing, following):
        await membership(manager).beat()
    await membership(following).beat()
    machines = [FakeMachine() for _ in range(count)]

    async def join(machine: FakeMachine) -> Machine:
        await changing.join(machine)
        return await changing.row(machine)

    rows = [await join(machine) for machine in machines]
    await following.reconciler.load()
    new = [await join(FakeMachine()) for _ in range(EVENTS)]
    some = [rows[number * count // EVENTS] for number in range(EVENTS)]

    async def take(row: Machine) -> None:
        assert row.public_key is not None
        epoch = 1 + (owner.epoch if (owner := owners(following).of(row.id)) else 0)
        taken = Ownership(machine_id=row.id, server_id="a", epoch=epoch, public_key=row.public_key, heard_at=0.0)
        owners(following).update(taken)
        await owners(following).settle()

    async def change(row: Machine) -> None:
        known = following.links.get(row.id)
        assert known is not None
        await following.reconciler.apply_change(replace(known.machine, name=row.id, revision=known.machine.revision + 1))

    return {
        "join": await calls_of(following.reconciler.apply_change, new),
        "change": await calls_of(change, some),
        "owner": await calls_of(take, some),
        "leave": await calls_of(lambda row: following.reconciler.forget(row, LeaveReason.REMOVED_ELSEWHERE), new),
    }


async def test_the_cost_of_another_servers_changes_does_not_grow_with_the_rows() -> None:
    before, after = await follow_costs(FEW), await follow_costs(MANY)
    assert all(before.values())
    assert {kind: after[kind] for kind in after if after[kind] > 1.3 * before[kind]} == {}


async def test_a_machine_takes_little_memory() -> None:
    gc.collect()
    async with open_crowd(FEW) as crowd:
        tracemalloc.start()
        try:
            base = tracemalloc.get_traced_memory()[0]
            new = [crowd.new_member() for _ in range(MANY)]
            theirs = tracemalloc.get_traced_memory()[0]
            for member in new:
                await crowd.join(member)
            gc.collect()
            joined = tracemalloc.get_traced_memory()[0]
            for member in new:
                crowd.shake_hands(member)
            await crowd.monitor.check()
            gc.collect()
            connected = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    assert theirs > base
    assert (joined - theirs) / MANY < 3_700
    assert (connected - theirs) / MANY < 6_800
