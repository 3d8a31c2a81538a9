"""Links in virtual time: pending machines, links that go down and come back, machines that leave."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import anyio
import pytest
from grpclib import Status

from siderolink.common.errors import ConfigurationError, DeviceError
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import InterfaceLost
from siderolink.server import (
    EventsLost,
    HandshakeCompleted,
    LeaveReason,
    LinkDown,
    LinkState,
    MachineJoined,
    MachineLeft,
    MachineLimits,
    MemoryStore,
)
from siderolink.server.admission.rules import LinkLiveness
from siderolink.server.events import EventHub
from siderolink.server.fleet.reconciler import EVERYTHING
from siderolink.server.store import Machine, Transaction
from siderolink.server.store.base import Work
from tests.support.manager import FakeMachine, Manager, drain, following, new_key

pytestmark = pytest.mark.anyio

T = TypeVar("T")


async def _settled(is_so: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not is_so():
            await anyio.lowlevel.checkpoint()


async def test_a_machine_that_never_shakes_hands_is_forgotten_when_its_time_is_up() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    answer = await manager.join(machine)
    assert manager.monitor.next_check_at == 600
    await manager.pass_time(599)
    answer = await manager.join(machine)
    assert manager.monitor.next_check_at == 600
    row = await manager.row(machine)
    link = manager.link(answer)
    await manager.pass_time(1)
    assert await manager.machines.find(machine.node_uuid) is None
    assert (len(manager.links), manager.links.pending, manager.device.configs) == (0, 0, {})
    assert manager.links.by_virtual_address(link.machine.virtual_address or row.overlay_address) is None
    assert (await manager.events())[-1] == MachineLeft(machine=row, reason=LeaveReason.NO_HANDSHAKE)
    assert not manager.monitor.next_check_at
    assert (await manager.join(machine)).node_address_prefix != answer.node_address_prefix


async def test_a_known_machine_whose_new_key_is_never_proved_keeps_its_row() -> None:
    manager, machine = Manager(), FakeMachine(unique_token="u")
    first = await manager.join(machine)
    await manager.handshake(machine)
    reborn = replace(machine, key=new_key())
    await manager.join(reborn)
    await manager.pass_time(59)
    assert set(manager.device.configs) == {machine.key, reborn.key}
    await manager.pass_time(1)
    assert set(manager.device.configs) == {machine.key}
    assert (await manager.row(machine)).public_key == machine.key
    assert manager.links.pending == 0
    await manager.pass_time(10_000)
    assert (await manager.join(machine)).node_address_prefix == first.node_address_prefix


async def test_a_first_handshake_brings_the_link_up_and_is_remembered() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.pass_time(10)
    await manager.handshake(machine)
    row = await manager.row(machine)
    assert row.linked_at == 1_000_010
    assert row.was_linked
    assert manager.monitor.next_check_at == 10 + 275
    await manager.handshake(machine)
    events = [event for event in await manager.events() if isinstance(event, HandshakeCompleted)]
    assert [event.is_first for event in events] == [True, False]


async def test_a_healthy_link_is_checked_once_per_interval_and_never_down() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    looks = 0
    while manager.time.now < 2 * 3600:
        await manager.pass_time(25)
        manager.device.hear(machine.key)
        looks += manager.monitor.next_check_at == manager.time.now + 275
    assert not [event for event in await manager.events() if isinstance(event, LinkDown)]
    assert looks <= 2 * 3600 / 250


async def test_a_silent_link_goes_down_on_the_second_and_is_reported_once() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(100)
    manager.device.hear(machine.key)
    await manager.pass_time(274)
    assert manager.monitor.next_check_at == 375
    await manager.pass_time(1)
    await manager.pass_time(10_000)
    events = await manager.events()
    assert [event for event in events if isinstance(event, LinkDown)] == [LinkDown(machine=await manager.row(machine))]
    assert machine.key in manager.device.configs
    await manager.handshake(machine)
    (back,) = await manager.events()
    assert isinstance(back, HandshakeCompleted)
    assert back.is_first
    assert manager.monitor.next_check_at == manager.time.now + 275


async def test_a_removed_machine_is_gone_and_may_join_as_a_new_one() -> None:
    async with following(Manager()) as manager:
        machine = FakeMachine(unique_token="u")
        await manager.join(machine)
        await manager.handshake(machine)
        row = await manager.row(machine)
        assert await manager.machines.remove(row.id)
        assert not await manager.machines.remove(row.id)
        assert manager.device.configs == {}
        await manager.join(replace(machine, unique_token="other"))
        joined = await manager.events()
        left = [event for event in joined if isinstance(event, MachineLeft)]
        assert left == [MachineLeft(machine=row, reason=LeaveReason.REMOVED)]
        assert isinstance(joined[-1], MachineJoined)
        assert joined[-1].is_new


@pytest.mark.parametrize("by", ["uuid", "UUID", "id"])
async def test_a_banned_machine_is_gone_and_refused_until_it_is_unbanned(by: str) -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    row = await manager.row(machine)
    name = {"uuid": machine.node_uuid, "UUID": machine.node_uuid.upper(), "id": row.id}[by]
    assert (await manager.bans.add(name)).machine is not None
    assert manager.device.configs == {}
    assert (await manager.events())[-1] == MachineLeft(machine=row, reason=LeaveReason.BANNED)
    assert await manager.refuses(machine) == (Status.PERMISSION_DENIED, "this machine is banned")
    await manager.bans.lift(machine.node_uuid)
    await manager.join(machine)


async def test_a_uuid_can_be_banned_before_it_is_seen() -> None:
    manager, machine = Manager(), FakeMachine()
    assert (await manager.bans.add(machine.node_uuid)).machine is None
    assert (await manager.refuses(machine))[1] == "this machine is banned"
    with pytest.raises(ConfigurationError):
        await manager.bans.add("no such machine")


async def test_a_failed_check_is_repeated() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)

    class Broken:
        async def __call__(self, work: object) -> object:
            raise DeviceError("the disk is on fire")

    healthy = manager.store.transact
    manager.store.transact = Broken()  # type: ignore[method-assign,assignment]
    await manager.pass_time(600)
    assert manager.monitor.next_check_at == 630
    manager.store.transact = healthy  # type: ignore[method-assign]
    await manager.pass_time(30)
    assert len(manager.links) == 0


async def test_a_lost_interface_ends_the_watch() -> None:
    manager = Manager()
    manager.monitor.on_device_event(InterfaceLost(reason="it was deleted"))
    with pytest.raises(DeviceError, match="it was deleted"):
        await manager.monitor.watch()


async def test_a_restarted_server_knows_its_machines_before_they_call() -> None:
    before, machine = Manager(), FakeMachine(tunnel=True)
    pending = FakeMachine()
    answer = await before.join(machine)
    await before.join(pending)
    await before.handshake(machine)
    after = Manager(store=before.store)
    await after.reconciler.load()
    assert set(after.device.configs) == {machine.key, pending.key}
    assert after.link(answer).state is LinkState.DOWN
    assert await after.events() == []
    assert after.links.pending == 1
    await after.pass_time(600)
    assert set(after.device.configs) == {machine.key}
    await after.handshake(machine)
    assert after.link(answer).state is LinkState.UP


async def test_a_machine_without_a_key_is_not_awaited_after_a_restart() -> None:
    before, machine = Manager(), FakeMachine(unique_token="u")
    await before.join(machine)
    await before.handshake(machine)
    await before.join(FakeMachine(key=machine.key, unique_token="u"))
    assert (await before.row(machine)).public_key is None
    after = Manager(store=before.store, limits=MachineLimits(max_pending=2))
    await after.reconciler.load()
    assert after.links.pending == 1


async def test_a_key_that_the_device_would_not_give_up_is_removed_with_the_next_join() -> None:
    manager, machine = Manager(), FakeMachine(unique_token="u")
    await manager.join(machine)
    await manager.handshake(machine)
    remove, manager.device.remove_peer = manager.device.remove_peer, _fails  # type: ignore[method-assign]
    successor = replace(machine, key=new_key())
    await manager.join(successor)
    await manager.handshake(successor)
    assert set(manager.device.configs) == {machine.key, successor.key}
    manager.device.remove_peer = remove  # type: ignore[method-assign]
    await manager.join(successor)
    assert set(manager.device.configs) == {successor.key}


async def test_a_removed_machines_key_is_given_up_later_if_the_device_would_not_give_it_up() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    row = await manager.row(machine)
    remove, manager.device.remove_peer = manager.device.remove_peer, _fails  # type: ignore[method-assign]
    assert await manager.machines.remove(row.id)
    assert MachineLeft(machine=row, reason=LeaveReason.REMOVED) in await manager.events()
    await manager.pass_time(600)
    assert set(manager.device.configs) == {machine.key}
    manager.device.remove_peer = remove  # type: ignore[method-assign]
    await manager.pass_time(600)
    assert not manager.device.configs


async def test_a_peer_that_the_device_does_not_give_up_delays_no_other_machine() -> None:
    manager, stuck, other = Manager(), FakeMachine(), FakeMachine()
    for machine in (stuck, other):
        await manager.join(machine)
        await manager.handshake(machine)
    remove = manager.device.remove_peer

    async def remove_others(public_key: PublicKey) -> None:
        if public_key == stuck.key:
            raise DeviceError("no answer")
        await remove(public_key)

    manager.device.remove_peer = remove_others  # type: ignore[method-assign]
    await manager.machines.remove((await manager.row(stuck)).id)
    row = await manager.row(other)
    await manager.store.transact(lambda transaction: transaction.delete(row.id))
    await manager.reconciler.resync(EVERYTHING)
    assert set(manager.device.configs) == {stuck.key}
    await manager.reconciler.resync(row.id)
    manager.device.remove_peer = remove  # type: ignore[method-assign]
    await manager.pass_time(600)
    assert not manager.device.configs


async def test_an_absent_machine_that_joins_at_the_last_moment_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    await manager.pass_time(4000)
    liveness = manager.fleet.liveness
    facts_of = liveness.of

    async def of(row: Machine, transaction: Transaction | None = None) -> LinkLiveness:
        facts = await facts_of(row, transaction)
        if transaction is None:
            await manager.join(replace(machine, tunnel=True))
        return facts

    monkeypatch.setattr(liveness, "of", of)
    await manager.machines.forget_absent_now(3600)
    assert (await manager.row(machine)).tunnel
    await manager.pass_time(4000)
    monkeypatch.undo()
    await manager.machines.forget_absent_now(3600)
    assert len(manager.links) == 0


async def _fails(public_key: PublicKey) -> None:
    raise DeviceError("no answer")


async def test_two_servers_with_one_store_follow_each_other() -> None:
    store = MemoryStore()
    async with following(Manager(store=store)) as here, following(Manager(store=store)) as there:
        machine = FakeMachine(unique_token="u", tunnel=True)
        answer = await here.join(machine)
        await _settled(lambda: machine.key in there.device.configs)
        there.link(answer)
        await there.handshake(machine)
        await here.pass_time(600)
        assert machine.key in here.device.configs
        row = await here.row(machine)
        await here.machines.remove(row.id)
        await _settled(lambda: not there.device.configs)
        left = [event for event in await there.events() if isinstance(event, MachineLeft)]
        assert left == [MachineLeft(machine=row, reason=LeaveReason.REMOVED_ELSEWHERE)]
        assert [event.reason for event in await here.events() if isinstance(event, MachineLeft)] == [LeaveReason.REMOVED]


async def test_a_server_that_lost_changes_reads_the_rows_again() -> None:
    store = MemoryStore(feed_limit=1)
    async with following(Manager(store=store)) as here, following(Manager(store=store)) as there:
        first, *others = [FakeMachine() for _ in range(6)]
        await here.join(first)
        await _settled(lambda: first.key in there.device.configs)

        for machine in others:
            await here.join(machine)
        await here.machines.remove((await here.row(first)).id)
        await _settled(lambda: set(there.device.configs) == {machine.key for machine in others})


async def test_a_slow_reader_learns_how_much_it_lost() -> None:
    hub = EventHub()
    slow, quick = hub.subscribe(limit=3), hub.subscribe()
    events = [EventsLost(count=-number) for number in range(5)]
    for event in events:
        hub.publish(event)
    assert await anext(slow) == EventsLost(count=2)
    assert [await anext(slow) for _ in range(3)] == events[2:]
    assert await drain(hub, quick) == events
    hub.end()
    assert [event async for event in slow][1:] == []
    assert [event async for event in hub.subscribe()] == []


async def test_a_limit_of_pending_machines_counts_those_that_shake_hands_out() -> None:
    manager = Manager(limits=MachineLimits(max_pending=1))
    for _ in range(3):
        machine = FakeMachine()
        await manager.join(machine)
        await manager.handshake(machine)
    await manager.join(FakeMachine())
    assert (await manager.refuses(FakeMachine()))[0] is Status.RESOURCE_EXHAUSTED


class CountedStore(MemoryStore):
    """Counts the transactions that are under way at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = self.most = 0

    async def transact(self, work: Work[T]) -> T:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await anyio.lowlevel.checkpoint()  # like a store that waits for a disk
        try:
            return await super().transact(work)
        finally:
            self.under_way -= 1


async def test_pending_writes_of_many_machines_share_a_transaction() -> None:
    store = CountedStore()
    manager = Manager(store=store)
    machines = [FakeMachine() for _ in range(40)]
    for machine in machines:
        await manager.join(machine)
    for machine in machines[:20]:
        manager.device.hear(machine.key, handshake=True)
    store.most = 0
    await manager.monitor.check()
    assert store.most == 20
    assert all([(await manager.row(machine)).linked_at for machine in machines[:20]])
    store.most = 0
    await manager.pass_time(600.0)
    assert store.most == 20
    assert len(manager.links) == 20
