"""Several servers of one store, in virtual time: what happens between a read or a commit and its use."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import pytest

from siderolink.common.errors import DeviceError, StoreError
from siderolink.common.tasks import background_tasks
from siderolink.server import LinkState, MemoryStore
from siderolink.server.fleet.membership import MAX_REMOVED, Membership
from siderolink.server.store import FleetServer, Transaction
from tests.support.fake_device import VirtualClock
from tests.support.manager import FakeMachine, Manager
from tests.support.several import UdpPath, fleet_of, linked, membership, owners, settled

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Work = Callable[[Transaction], Awaitable[T]]


class Late(MemoryStore):
    """Tells the outcome of a transaction only after something else has happened."""

    meanwhile: Callable[[], Awaitable[None]] | None = None
    """What happens between the next commit and its answer."""

    async def transact(self, work: Work[T]) -> T:
        found = await super().transact(work)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        return found

    transact_urgently = transact


async def test_a_server_that_starts_while_another_reads_the_servers_is_not_gone() -> None:
    store = Late()
    async with fleet_of("a", "b", store=store) as fleet:
        a, new = membership(fleet["a"]), Membership(store, fleet.time.clock, server_id="new")
        dead: list[str] = []
        a.on_dead = dead.append

        async def start() -> None:
            await new.beat()
            await settled(lambda: a.get("new") is not None)

        store.meanwhile = start
        await a.beat()
        assert a.is_alive("new")
        assert dead == []

        async def leave() -> None:
            await new.leave()
            await settled(lambda: a.get("new") is None)

        store.meanwhile = leave
        await a.beat()
        assert a.get("new") is None
        assert dead == ["new"]
        await a.beat()
        assert dead == ["new"], "reported once"


async def test_of_servers_that_stop_only_the_last_ones_are_remembered() -> None:
    async with fleet_of("a") as fleet:
        a = membership(fleet["a"])
        dead: list[str] = []
        a.on_dead = dead.append
        for number in range(MAX_REMOVED + 2):
            server = FleetServer(id=str(number), heartbeat_at=fleet.time.clock.time())
            a.changed(server, False)
            for _ in range(2):  # the feed may tell it again
                a.changed(server, True)
            assert dead == [str(number)]
            dead.clear()
        for number in (0, MAX_REMOVED + 1):
            a.changed(FleetServer(id=str(number), heartbeat_at=fleet.time.clock.time()), True)
        assert dead == ["0"]


async def test_a_server_without_its_database_does_not_try_more_often_when_others_would_be_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("siderolink.server.fleet.membership.HEARTBEAT_SECONDS", 0.2)

    class Away(MemoryStore):
        tries = 0
        is_away = False

        async def transact_urgently(self, work: Work[T]) -> T:
            self.tries += self.is_away
            if self.is_away:
                raise StoreError("the database is away")
            return await super().transact_urgently(work)

    store, time = Away(), VirtualClock()
    a, b = (Membership(store, time.clock, server_id=name) for name in "ab")
    for one in (a, b, a):
        await one.beat()
    store.is_away = True
    time.advance(60)
    async with background_tasks() as tasks:
        tasks.start_soon(a.run)
        await anyio.sleep(1.0)
    assert 1 <= store.tries <= 7


async def test_a_link_that_another_server_took_before_the_own_commit_is_known_is_lost() -> None:
    store = Late()
    async with fleet_of("a", "b", "c", store=store) as fleet:
        machine = await linked(fleet, "c")
        row = await fleet["a"].row(machine)

        async def move_on() -> None:
            fleet["b"].device.hear(machine.key, UdpPath("198.51.100.7:3"), handshake=True)
            await settled(lambda: owners(fleet["a"]).owner_of(row.id) == "b")

        store.meanwhile = move_on
        fleet["a"].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        await settled(lambda: owners(fleet["a"]).owner_of(row.id) == "b")
        await fleet.is_owned_by(machine, "b")
        link = fleet["a"].links.by_key(machine.key)
        assert link is not None
        assert link.state is LinkState.DOWN


async def test_a_machine_that_is_deleted_before_the_own_commit_is_known_leaves_no_owner_behind() -> None:
    store = Late()
    async with fleet_of("a", "b", store=store) as fleet:
        machine = await linked(fleet, "b")
        row = await fleet["a"].row(machine)

        async def delete() -> None:
            await store.transact(lambda transaction: transaction.delete(row.id))
            await settled(lambda: fleet["a"].links.get(row.id) is None)

        store.meanwhile = delete
        fleet["a"].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        await settled(lambda: store.meanwhile is None and fleet["b"].links.get(row.id) is None)
        await owners(fleet["a"]).settle()
        assert not owners(fleet["a"]).counts()


async def test_a_peer_that_could_not_be_made_passive_is_tried_again() -> None:
    async with fleet_of("a", "b") as fleet:
        machine = await linked(fleet, "a")
        fleet["a"].device.fails_with = DeviceError("no buffer space available")
        fleet["b"].device.hear(machine.key, UdpPath("198.51.100.7:2"), handshake=True)
        row = await fleet["a"].row(machine)
        await settled(lambda: owners(fleet["a"]).owner_of(row.id) == "b")
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert not fleet.is_passive("a", machine)
        fleet["a"].device.fails_with = None
        await fleet.is_owned_by(machine, "b")


async def test_who_waits_for_an_address_is_woken_though_another_one_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siderolink.server.fleet.directory._FEED_SECONDS", 300)
    store = MemoryStore()
    here, there, machine = Manager(store=store), Manager(store=store), FakeMachine(tunnel=True)
    await here.join(machine)
    row = await here.row(machine)
    address = row.virtual_address
    assert address is not None
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(there.links.await_virtual_address, address)
            async with background_tasks() as others:
                others.start_soon(there.links.await_virtual_address, address)
                await anyio.lowlevel.checkpoint()
            await there.reconciler.apply_change(row)
