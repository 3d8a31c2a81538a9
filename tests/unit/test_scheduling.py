"""The core is given to other processes between batches of small packets, but not to those that keep it."""

import os

import pytest

from siderolink.common.wireguard import dataplane
from siderolink.common.wireguard.dataplane import MANY_PACKETS
from siderolink.common.wireguard.scheduling import LONG_TURN, CoreYielder
from tests.support.ends import frame, linked
from tests.support.packets import TCP, Packet


class Core:
    """A core's clock, and how long the others keep it each time that it is yielded."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.turn = 0.0
        self.yielded = 0

    def sched_yield(self) -> None:
        self.yielded += 1
        self.now += self.turn


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    found = Core()
    monkeypatch.setattr(os, "sched_yield", found.sched_yield)
    return found


def test_short_turns_are_always_given(core: Core) -> None:
    yielder = CoreYielder(clock=lambda: core.now)
    for core.turn in (0.0, LONG_TURN / 2, 0.0, LONG_TURN * 0.99):
        yielder.yield_core()
    assert core.yielded == 4


def test_a_long_turn_is_followed_by_a_pause_that_grows_with_each_and_shrinks_again(core: Core) -> None:
    yielder = CoreYielder(clock=lambda: core.now)

    def pause(turn: float) -> float:
        """In turns, how long nothing is yielded after one."""
        core.turn, before = turn, core.yielded
        yielder.yield_core()
        assert core.yielded == before + 1
        core.turn, ended = 0.0, core.now
        while core.yielded == before + 1:
            core.now += turn
            yielder.yield_core()
        return (core.now - ended) / turn

    # the yield that ends each pause is short, so that the next pause is as long; only what is long again makes it grow
    assert pause(0.001) == pytest.approx(4, abs=1)
    assert pause(0.001) == pytest.approx(4, abs=1)
    core.turn, before = 0.001, core.now
    for _ in range(200_000):
        core.now += 0.0001
        yielder.yield_core()
    given = (core.yielded * 0.001) / (core.now - before)
    assert given < 0.01, "processes that compute get hardly anything"
    for _ in range(8):
        core.now, core.turn = core.now + 2, 0.0
        yielder.yield_core()
    assert pause(0.001) == pytest.approx(4, abs=1)


def test_a_stopped_process_yields_again_after_a_second(core: Core) -> None:
    yielder = CoreYielder(clock=lambda: core.now)
    core.turn = 3600.0
    yielder.yield_core()
    core.turn = 0.0
    core.now += 0.9
    yielder.yield_core()
    assert core.yielded == 1
    core.now += 0.2
    yielder.yield_core()
    assert core.yielded == 2


@pytest.mark.parametrize(
    ("frames", "turns"),
    [
        ([frame(100)] * MANY_PACKETS, 1),
        ([frame(1200)] * MANY_PACKETS, 1),
        ([frame(100)] * (MANY_PACKETS - 1), 0),
        ([Packet(protocol=TCP, payload=bytes(2440)).frame(1220)] * MANY_PACKETS, 0),
    ],
    ids=["small", "full", "few", "super-packets"],
)
def test_many_small_packets_read_at_once_give_others_a_turn(
    monkeypatch: pytest.MonkeyPatch, core: Core, frames: list[bytes], turns: int
) -> None:
    monkeypatch.setattr(dataplane, "QUIET_INTERVAL", 1e9)
    end = linked()
    end.interface.frames.extend(frames)
    while end.interface.frames:
        end.plane.read_interface()
    assert core.yielded == turns
