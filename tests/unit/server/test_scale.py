"""What a machine and an event cost among many, counted in calls and bytes, not in seconds. The figures: benchmarks/scale.py."""

import gc
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from types import FrameType

import pytest

from tests.support.crowd import Crowd, Member, open_crowd

pytestmark = pytest.mark.anyio

FEW, MANY = 10, 120
EVENTS = 40


async def calls_of(act: Callable[[Member], Awaitable[object]], members: list[Member]) -> int:
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


async def test_no_event_costs_the_number_of_machines() -> None:
    async with open_crowd(FEW) as few, open_crowd(MANY) as many:
        before, after = await costs(few), await costs(many)
    # a search in a heap of twelve times as many takes four steps more
    assert {kind: after[kind] for kind in after if after[kind] > 1.3 * before[kind] + 4 * EVENTS} == {}


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
    assert (joined - theirs) / MANY < 5_000
    assert (connected - theirs) / MANY < 12_000
