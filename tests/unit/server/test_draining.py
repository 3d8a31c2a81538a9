"""A server that drains: its row, its answers and the others', and the machines that it asks to go."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address

import anyio
import pytest

from siderolink.common.errors import ForbiddenError, NotFoundError, SideroLinkError
from siderolink.common.tasks import background_tasks
from siderolink.server.admin.audit_log import AuditLog
from siderolink.server.admin.servers import Servers
from siderolink.server.fleet.draining import MAX_REQUESTS, Draining
from siderolink.server.fleet.owners import KEEP_ANSWERING_SECONDS
from siderolink.server.store import Actor, AuditQuery, Role
from tests.support.fake_device import FakeDevice, VirtualClock
from tests.support.manager import FakeMachine
from tests.support.several import Fleet, fleet_of, membership, settled

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def draining(fleet: Fleet, name: str, asked: list[IPv6Address]) -> AsyncIterator[Draining]:
    manager = fleet[name]
    # its own clock, which its two tasks advance; in the fleet's clock heartbeats would expire
    found = Draining(manager.membership, manager.fleet.owners, manager.links, asked.append, VirtualClock().clock)
    async with background_tasks() as tasks:
        tasks.start_soon(found.watch)
        yield found


def servers(fleet: Fleet, name: str, drain: Draining) -> Servers:
    audit = AuditLog(fleet[name].store, fleet.time.clock)
    return Servers(membership(fleet[name]), drain, audit, fleet.time.clock)


async def at(fleet: Fleet, name: str) -> FakeMachine:
    machine = FakeMachine()
    await fleet[name].join(machine)
    await fleet[name].handshake(machine)
    await fleet.is_owned_by(machine, name)
    return machine


async def test_a_draining_server_asks_its_machines_to_move_and_gets_no_new_ones() -> None:
    asked: list[IPv6Address] = []
    async with fleet_of("a", "b") as fleet, draining(fleet, "a", asked) as drain:
        a, b = membership(fleet["a"]), membership(fleet["b"])
        for name, one in (("a", a), ("b", b)):
            one.describe(endpoints=[f"{name}.example.com:51820"])
            await one.beat()
        await a.beat()
        mine, _ = await at(fleet, "a"), await at(fleet, "b")
        assert [drain.has_begun, await drain.run(30), drain.has_begun] == [False, 1, True]
        assert asked == [(await fleet["a"].row(mine)).overlay_address] * MAX_REQUESTS
        await fleet.pass_time(1)
        assert b.endpoints() == ["b.example.com:51820"]
        assert a.endpoints() == ["b.example.com:51820", "a.example.com:51820"]
        await fleet["b"].handshake(mine)
        await fleet.is_owned_by(mine, "b")
        asked.clear()
        assert await drain.run(10) == 0
        assert asked == []


async def test_a_machine_that_moved_is_still_answered_for_a_second() -> None:
    async with fleet_of("a", "b") as fleet, draining(fleet, "a", []) as drain:
        mine = await at(fleet, "a")
        await anext(drain.steps(30))
        during: list[bool] = []
        fleet.time.on_sleep = lambda: during.append(fleet.is_passive("a", mine))
        left_at = fleet.time.now
        await fleet["b"].handshake(mine)
        await fleet.is_owned_by(mine, "b")
        assert during[0] is False
        assert fleet.time.now - left_at >= KEEP_ANSWERING_SECONDS


async def test_the_kernels_device_is_ready_for_machines_before_they_are_asked_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "kind", "kernel")
    asked: list[IPv6Address] = []
    async with fleet_of("a", "b") as fleet, draining(fleet, "a", asked) as drain:
        mine = await at(fleet, "a")

        def may_arrive() -> bool:
            return fleet["b"].device.configs[mine.key].may_arrive

        assert not may_arrive()
        await anext(drain.steps(30))
        assert membership(fleet["a"]).is_draining
        assert asked == []
        await fleet.pass_time(1)
        await settled(may_arrive)
        assert fleet.is_passive("b", mine)
        await settled(lambda: bool(asked))
        await drain.undo()
        await fleet.pass_time(1)
        await settled(lambda: not may_arrive())
        await fleet.pass_time(5, "b")  # a is dead, and b would dial it where it was heard
        await settled(lambda: not fleet.is_passive("b", mine))


async def test_a_drain_cancelled_while_it_counts_machines_has_not_begun() -> None:
    async with fleet_of("a", "b") as fleet, draining(fleet, "a", []) as drain:
        await at(fleet, "a")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await anext(drain.steps(30))
        assert scope.cancelled_caught
        assert [drain.has_begun, membership(fleet["a"]).is_draining] == [False, False]
        await anext(drain.steps(30))
        assert [drain.has_begun, membership(fleet["a"]).is_draining] == [True, True]


async def test_an_undone_drain_asks_no_more_machines() -> None:
    asked: list[IPv6Address] = []
    async with fleet_of("a", "b") as fleet, background_tasks() as tasks:
        manager = fleet["a"]

        def request(address: IPv6Address) -> None:
            if not asked:
                tasks.start_soon(drain.undo)
            asked.append(address)

        time = VirtualClock()
        drain = Draining(manager.membership, manager.fleet.owners, manager.links, request, time.clock)
        tasks.start_soon(drain.watch)
        for _ in range(70):
            await at(fleet, "a")
        await anext(drain.steps(30))
        await settled(lambda: bool(asked) and not drain.has_begun)
        for _ in range(10):
            time.advance(1)
            await anyio.wait_all_tasks_blocked()
        assert len(asked) == 32, "the first part only"


async def test_without_a_successor_a_drain_does_not_wait() -> None:
    async with fleet_of("a", "b") as fleet, draining(fleet, "b", []) as other, draining(fleet, "a", []) as alone:
        await other.run(0)
        await fleet.pass_time(1)
        await at(fleet, "a")
        before = fleet.time.now
        assert await alone.run(60) == 0
        assert not alone.has_begun
        assert fleet.time.now == before
        with pytest.raises(SideroLinkError, match="machines have nowhere to go"):
            await anext(servers(fleet, "a", alone).drain())


async def test_a_drain_by_command_reports_progress_is_audited_and_can_be_undone() -> None:
    asked: list[IPv6Address] = []
    async with fleet_of("a", "b") as fleet, draining(fleet, "a", asked) as drain:
        b = membership(fleet["b"])
        found = servers(fleet, "a", drain)
        with pytest.raises(SideroLinkError, match="is not being drained"):
            await found.undo_drain()
        await at(fleet, "a")
        steps = [(step.left, step.others, step.is_over) async for step in found.drain(timeout=20)]
        assert steps == [(1, 1, False)] * (len(steps) - 1) + [(1, 1, True)]
        assert len(steps) > 2
        await fleet.pass_time(1)
        assert [(one.id, one.is_draining) for one in b.everyone()] == [("b", False), ("a", True)]
        assert b.heir("any") == "b"
        # machines that arrive during the drain are asked, too, even without a follower
        asked.clear()
        later = await at(fleet, "a")
        address = (await fleet["a"].row(later)).overlay_address
        await settled(lambda: asked.count(address) == MAX_REQUESTS)
        await found.undo_drain("a")
        assert not drain.has_begun
        await fleet.pass_time(1)
        assert [one.is_draining for one in b.living()] == [False, False]
        entries = await fleet["a"].store.audit_entries(AuditQuery(limit=2, newest_first=True))
        assert [(entry.action, entry.object_id) for entry in entries] == [("server.undo_drain", "a"), ("server.drain", "a")]


async def test_followers_see_that_a_drain_was_undone_and_a_stop_cannot_be_undone() -> None:
    async with fleet_of("a", "b") as fleet, draining(fleet, "a", []) as drain:
        await at(fleet, "a")
        steps = drain.steps(30)
        await anext(steps)
        await drain.undo()
        with pytest.raises(SideroLinkError, match="the drain was undone"):
            await anext(steps)
        await drain.run(1)
        with pytest.raises(SideroLinkError, match="about to stop"):
            await drain.undo()


async def test_only_admins_drain_and_an_unknown_server_is_refused() -> None:
    async with fleet_of("a", "b") as fleet, draining(fleet, "a", []) as drain:
        found = servers(fleet, "a", drain)
        operator = Actor(name="eve", role=Role.OPERATOR)
        with pytest.raises(ForbiddenError):
            await anext(found.drain(actor=operator))
        with pytest.raises(ForbiddenError):
            await found.undo_drain(actor=operator)
        with pytest.raises(NotFoundError, match="no live server that can be called has the name 'c'"):
            await anext(found.drain("c"))
        for timeout in (-1.0, float("nan"), 1e9):
            with pytest.raises(SideroLinkError, match="a drain timeout must be"):
                await anext(found.drain(timeout=timeout))
        assert not drain.has_begun
