"""Steps of the wall clock change nothing in rules about silence."""

from dataclasses import replace

import pytest
from grpclib import Status

from siderolink.server.clock import Clock
from tests.support.fake_device import VirtualClock
from tests.support.manager import FakeMachine, Manager, new_key

pytestmark = pytest.mark.anyio


class Stepped(VirtualClock):
    """A wall clock that somebody sets."""

    step = 0.0

    @property
    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, time=lambda: 1_000_000.0 + self.now + self.step, sleep=self.sleep)


@pytest.mark.parametrize("step", [120.0, -3600.0])
async def test_a_step_neither_gives_a_living_link_away_nor_keeps_a_machine_out(step: float) -> None:
    time = Stepped()
    manager, machine = Manager(time=time), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(10)
    manager.device.hear(machine.key)
    time.step = step
    reborn = replace(machine, key=new_key(), source="203.0.113.9")
    assert (await manager.refuses(reborn))[0] is Status.ALREADY_EXISTS
    await manager.pass_time(59)
    assert (await manager.refuses(reborn))[0] is Status.ALREADY_EXISTS
    await manager.pass_time(1)
    await manager.join(reborn)
    await manager.handshake(reborn)
    assert (await manager.row(machine)).public_key == reborn.key


async def test_a_silent_link_is_down_in_time_though_the_clock_goes_back() -> None:
    time = Stepped()
    manager, machine = Manager(time=time), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    await manager.handshake(machine)
    time.step = -3600.0
    await manager.pass_time(275)
    assert manager.link(answer).state == "down"
