"""No work on all machines visits more than some of them in one turn of the loop. Counted, not timed."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from siderolink.common.parted_dict import AT_ONCE, PartedDict
from siderolink.common.pb.siderolink.peers.v1 import LinkStatesRequest
from siderolink.common.tasks import background_tasks
from siderolink.common.wireguard.noise import Drop
from siderolink.server.admin.following import Follower
from siderolink.server.admin.hostnames import Hostnames
from siderolink.server.admin.machines import SORTS, MachineAdministration, MachineQuery, all_statuses
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub
from siderolink.server.fleet.dialling import dial_links, dial_remembered
from siderolink.server.fleet.directory import MachineLink
from siderolink.server.fleet.draining import MAX_REQUESTS, Draining
from siderolink.server.fleet.limit_watch import LimitWatch
from siderolink.server.fleet.membership import Membership
from siderolink.server.fleet.owners import Owners
from siderolink.server.peers.service import PeerService
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.model import ReportDrop, ReportOptions
from siderolink.server.store import Machine, MemoryStore, Ownership
from tests.support.crowd import Crowd, open_crowd
from tests.support.fake_device import VirtualClock
from tests.support.several import fleet_of, membership

pytestmark = pytest.mark.anyio

MACHINES = 3 * AT_ONCE + 7
Work = Callable[[Crowd], Awaitable[object]]


def administration(crowd: Crowd) -> MachineAdministration:
    return MachineAdministration(MemoryStore(), crowd.directory, crowd.machines, crowd.device, EventHub(), Clock())


async def to_the_end(parts: AsyncIterator[Any]) -> None:
    async for _ in parts:
        pass


async def count_drops(crowd: Crowd) -> None:
    crowd.device.engine.drops[Drop.BANDWIDTH_IN] = 1
    await crowd.device.limit_drops()


async def poll_twice(crowd: Crowd) -> None:
    machines = administration(crowd)
    follower = Follower(machines, Hostnames(crowd.directory))
    await to_the_end(follower.changes())
    await to_the_end(follower.changes())


async def tell_other_servers(crowd: Crowd) -> None:
    limits = LimitWatch(crowd.device, crowd.directory, EventHub(), Clock())

    async def heard_at(_: str) -> float:
        return 0.0

    service = PeerService(crowd.directory, crowd.device, Clock(), heard_at, limits)
    await to_the_end(service.link_states(LinkStatesRequest()))


async def watch_limits(crowd: Crowd) -> None:
    limits = LimitWatch(crowd.device, crowd.directory, EventHub(), Clock())
    ingest = ReportIngest(ReportOptions(), crowd.directory.machine_at)
    for link in LINKS:
        ingest.drop(link.machine, ReportDrop.LINE_RATE_LIMITED)
    limits.report_drops = ingest.limit_drops
    await limits.poll()
    assert (await limits.totals()).limited_machines == len(await limits.limited()) == MACHINES


async def list_accepted(crowd: Crowd) -> None:
    limits = LimitWatch(crowd.device, crowd.directory, EventHub(), Clock())
    await to_the_end(all_statuses(crowd.device, crowd.directory, limits, lambda machine: machine.is_accepted))


async def dial_all(crowd: Crowd) -> None:
    await dial_remembered(crowd.directory, crowd.sessions, crowd.reconciler)


async def see_a_server_drain(crowd: Crowd) -> None:
    store, clock, applied = MemoryStore(), VirtualClock().clock, list[MachineLink]()
    membership = Membership(store, clock, server_id="a", endpoints=())
    owners = Owners(membership, crowd.directory, store, clock, paths_are_proven=False)

    async def apply(link: MachineLink) -> None:
        applied.append(link)

    owners.apply = apply
    for link in LINKS:
        key = link.machine.public_key
        assert key is not None
        owners.update(Ownership(machine_id=link.machine.id, server_id="b", epoch=1, public_key=key, heard_at=0.0))
    await owners.settle()
    applied.clear()
    membership.on_standing("b")
    await owners.settle()
    assert len(applied) == MACHINES


def sorted_by(sort: str) -> Work:
    return lambda crowd: administration(crowd).page(MachineQuery(sort=sort, page_size=20))


LINKS: list[Any] = []
WORKS: dict[str, Work] = {
    "the device's counters": lambda crowd: crowd.device.counters(),
    "the device's peers": lambda crowd: crowd.device.peers(),
    "drops by limits": count_drops,
    "a program that follows": poll_twice,
    "accepted machines": list_accepted,
    "another server's question": tell_other_servers,
    "limits": watch_limits,
    "machines of a server that drains": see_a_server_drain,
    "machines to dial": dial_all,
    "machines to forget": lambda crowd: crowd.machines.forget_absent_now(1e9),
    **{f"a list by {sort}": sorted_by(sort) for sort in SORTS},
}


async def test_no_turn_visits_all_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    visited = most = total = 0

    def parts(self: PartedDict[Any, Any], size: int = AT_ONCE) -> Iterator[list[Any]]:
        nonlocal visited, most, total
        for part in whole(self, size):
            visited += len(part)
            total += len(part)
            most = max(most, visited)
            yield part

    async def turn() -> None:
        nonlocal visited
        while True:
            visited = 0
            await anyio.lowlevel.checkpoint()

    def refuse(self: PartedDict[Any, Any]) -> Iterator[Any]:
        raise AssertionError("all of it is visited at once")

    whole = PartedDict.parts
    async with open_crowd(MACHINES) as crowd, anyio.create_task_group() as tasks:
        LINKS[:] = crowd.directory
        tasks.start_soon(turn)
        with monkeypatch.context() as patched:
            patched.setattr(PartedDict, "parts", parts)
            patched.setattr(PartedDict, "__iter__", refuse)
            for name, work in WORKS.items():
                await anyio.lowlevel.checkpoint()
                most = total = 0
                await work(crowd)
                assert total >= MACHINES, f"{name}: all are visited"
                assert most <= AT_ONCE, name
        tasks.cancel_scope.cancel()
    LINKS.clear()


async def test_no_turn_looks_at_all_machines_that_need_no_dial() -> None:
    looked = most = 0

    def endpoint_of(_: object) -> None:
        nonlocal looked, most
        looked += 1
        most = max(most, looked)

    async def turn() -> None:
        nonlocal looked
        while True:
            looked = 0
            await anyio.lowlevel.checkpoint()

    async def dial(*_: object) -> None:
        raise AssertionError("none has an endpoint")

    async with open_crowd(MACHINES) as crowd, anyio.create_task_group() as tasks:
        tasks.start_soon(turn)
        await dial_links(
            list(crowd.directory),
            crowd.directory,
            crowd.sessions,
            dial,
            may_dial=lambda _: True,
            endpoint_of=endpoint_of,
        )
        tasks.cancel_scope.cancel()
    assert 0 < most <= AT_ONCE


class Looked:
    """A machine's row that counts how often its id is read."""

    count = 0

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        Looked.count += name == "id"
        return getattr(self._machine, name)


async def test_no_turn_asks_all_machines_to_move() -> None:
    asked: list[object] = []
    most = 0

    async def turn() -> None:
        nonlocal most
        while True:
            most = max(most, Looked.count)
            Looked.count = 0
            await anyio.lowlevel.checkpoint()

    async with open_crowd(MACHINES) as crowd, fleet_of("a", "b") as fleet, background_tasks() as tasks:
        for link in crowd.directory:
            link.machine = cast("Machine", Looked(link.machine))
        draining = Draining(membership(fleet["a"]), None, crowd.directory, asked.append, VirtualClock().clock)
        tasks.start_soon(turn)
        tasks.start_soon(draining.watch)
        await anext(draining.steps(30))
        with anyio.fail_after(60):
            while len(asked) < MACHINES * MAX_REQUESTS:
                await anyio.lowlevel.checkpoint()
    assert 0 < most <= 4 * AT_ONCE, "a few looks at each machine of a part"
    assert len(asked) == MACHINES * MAX_REQUESTS
