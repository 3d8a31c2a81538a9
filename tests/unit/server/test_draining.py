"""A server that drains: its row, its answers and the others', and the machines that it asks to go."""

from ipaddress import IPv6Address

import pytest

from siderolink.server.fleet.draining import ASKED_TIMES, Draining
from tests.support.manager import FakeMachine
from tests.support.several import Fleet, fleet_of, membership

pytestmark = pytest.mark.anyio


def draining(fleet: Fleet, name: str, asked: list[IPv6Address]) -> Draining:
    manager = fleet[name]
    return Draining(manager.membership, manager.fleet.owners, manager.links, asked.append, fleet.time.clock)


async def test_its_own_machines_are_asked_and_nobody_is_sent_to_it_any_more() -> None:
    async with fleet_of("a", "b") as fleet:
        a, b = membership(fleet["a"]), membership(fleet["b"])
        for name, one in (("a", a), ("b", b)):
            one.describe(endpoints=[f"{name}.example.com:51820"])
            await one.beat()
        await a.beat()
        mine, other = FakeMachine(), FakeMachine()
        for machine, name in ((mine, "a"), (other, "b")):
            await fleet[name].join(machine)
            await fleet[name].handshake(machine)
            await fleet.is_owned_by(machine, name)
        asked: list[IPv6Address] = []
        drain = draining(fleet, "a", asked)
        assert [drain.has_begun, await drain.run(10), drain.has_begun] == [False, 1, True]
        assert asked == [(await fleet["a"].row(mine)).overlay_address] * ASKED_TIMES
        await fleet.pass_time(1)
        assert b.endpoints() == ["b.example.com:51820"]
        assert a.endpoints() == ["b.example.com:51820", "a.example.com:51820"]
        await fleet["b"].handshake(mine)
        await fleet.is_owned_by(mine, "b")
        asked.clear()
        assert await drain.run(10) == 0
        assert asked == []


async def test_a_server_alone_or_among_leaving_ones_does_not_wait() -> None:
    async with fleet_of("a", "b") as fleet:
        await draining(fleet, "b", []).run(0)
        await fleet.pass_time(1)
        machine = FakeMachine()
        await fleet["a"].join(machine)
        await fleet["a"].handshake(machine)
        alone = draining(fleet, "a", [])
        before = fleet.time.now
        assert await alone.run(60) == 0
        assert not alone.has_begun
        assert fleet.time.now == before
