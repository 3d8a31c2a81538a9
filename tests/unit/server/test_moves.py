"""A known key that calls with another UUID, and evictions when rows without a handshake fill the table."""

import uuid
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Interface, IPv6Network

import anyio
import pytest
from grpclib import GRPCError, Status

from siderolink.common.addressing import parse_peer_addr_port
from siderolink.common.errors import DeviceError, StoreError
from siderolink.common.tasks import background_tasks
from siderolink.server import AdmissionChanged, LeaveReason, LinkState, MachineAdmission, MachineLeft, MachineLimits
from siderolink.server.admission.policy import JoinTokensMode
from siderolink.server.admission.tokens import unique_token_digest
from siderolink.server.fleet.moves import MOVE_SECONDS
from siderolink.server.fleet.reconciler import EVERYTHING
from siderolink.server.store import Machine, MemoryStore, Transaction
from siderolink.server.store.base import T, Work
from tests.support.fake_device import FakePath
from tests.support.manager import FakeMachine, Manager, following, new_key, pass_time_of_moves

pytestmark = pytest.mark.anyio

NEW_UUID = "11111111-2222-4333-8444-555555555555"


def network(text: str) -> IPv6Network:
    return IPv6Network(IPv6Interface(text).ip)


async def test_a_key_moves_to_another_uuid_once_its_holder_answers_at_the_new_address() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    first = await manager.join(machine)
    path, ended = FakePath(machine.key), list[object]()
    manager.monitor.open_stream(manager.link(first), path, ended.append)
    manager.device.hear(machine.key, path)
    await manager.handshake(machine)
    renamed = replace(machine, node_uuid=NEW_UUID, unique_token="its own")
    second = await manager.join(renamed)
    assert second.node_address_prefix != first.node_address_prefix
    row = await manager.row(machine)
    assert row.public_key == machine.key, "nothing changes until then"
    assert await manager.machines.find(NEW_UUID) is None
    assert set(manager.device.configs[machine.key].allowed_ips) == {
        network(first.node_address_prefix),
        network(second.node_address_prefix),
    }
    address = IPv6Interface(second.node_address_prefix).ip
    assert manager.fleet.moves.awaits(address)
    await manager.fleet.moves.answered(address)
    moved = await manager.row(renamed)
    assert (moved.public_key, moved.overlay_address, moved.was_linked) == (machine.key, address, True)
    assert moved.bound_digest is not None
    assert (await manager.row(machine)).public_key is None
    assert manager.device.configs[machine.key].allowed_ips == (network(second.node_address_prefix),)
    assert ended == [], "the stream goes on"
    assert [event.machine.node_uuid for event in await manager.events() if isinstance(event, AdmissionChanged)] == [NEW_UUID]
    assert (await manager.join(renamed)).node_address_prefix == second.node_address_prefix


async def test_with_its_token_a_key_moves_at_once_and_packets_in_flight_still_arrive() -> None:
    """The write of META 15 that arrived at the old address is answered from it; a tunnel's stream continues."""
    manager, machine = Manager(), FakeMachine(tunnel=True, unique_token="its own")
    first = await manager.join(machine)
    path, ended = FakePath(machine.key), list[object]()
    manager.monitor.open_stream(manager.link(first), path, ended.append)
    manager.device.hear(machine.key, path)
    await manager.handshake(machine)
    for node_uuid in (NEW_UUID, machine.node_uuid):
        before = manager.device.configs[machine.key].allowed_ips[0]
        answer = await manager.join(replace(machine, node_uuid=node_uuid))
        new = network(answer.node_address_prefix)
        assert manager.device.configs[machine.key].allowed_ips == (new, before)
        assert answer.grpc_peer_addr_port == first.grpc_peer_addr_port
        assert manager.link(answer).machine.node_uuid == node_uuid
        await pass_time_of_moves(manager, 11)
        assert manager.device.configs[machine.key].allowed_ips == (new,)
        await manager.handshake(replace(machine, node_uuid=node_uuid))
        assert ended == [] or node_uuid == machine.node_uuid, "back to its own row, it opens a stream again"


async def test_an_address_that_the_device_did_not_take_away_is_taken_away_later(caplog: pytest.LogCaptureFixture) -> None:
    manager, machine = Manager(), FakeMachine()
    first = await manager.join(machine)
    await manager.handshake(machine)
    await manager.join(replace(machine, node_uuid=NEW_UUID))
    assert len(manager.device.configs[machine.key].allowed_ips) == 2
    manager.device.fails_with = DeviceError("busy")
    await pass_time_of_moves(manager, MOVE_SECONDS)
    assert len(manager.device.configs[machine.key].allowed_ips) == 2
    assert caplog.text.count("could not be removed from a machine's peer; retrying: busy") == 1
    manager.device.fails_with = None
    await pass_time_of_moves(manager)
    assert manager.device.configs[machine.key].allowed_ips == (network(first.node_address_prefix),)


async def test_a_caller_that_only_read_the_key_moves_nothing() -> None:
    manager, machine = Manager(), FakeMachine()
    first = await manager.join(machine)
    await manager.handshake(machine)
    await manager.join(replace(machine, node_uuid=NEW_UUID, unique_token="a thief's"))
    await manager.fleet.moves.answered(IPv6Interface(first.node_address_prefix).ip)
    manager.time.advance(61)
    assert not manager.fleet.moves.awaits(IPv6Interface(first.node_address_prefix).ip)
    assert (await manager.row(machine)).public_key == machine.key
    assert await manager.machines.find(NEW_UUID) is None


async def test_a_bound_key_moves_with_its_token_at_once_and_else_by_an_echo() -> None:
    """A machine that lost META while it runs has neither its UUID nor its token, but its key."""
    manager, machine = Manager(), FakeMachine(unique_token="u")
    await manager.join(machine)
    await manager.handshake(machine)
    without = replace(machine, node_uuid=NEW_UUID, unique_token=None)
    address = IPv6Interface((await manager.join(without)).node_address_prefix).ip
    assert (await manager.row(machine)).public_key == machine.key, "nothing changes until then"
    await manager.fleet.moves.answered(address)
    moved = await manager.row(without)
    assert (moved.public_key, moved.bound_digest) == (machine.key, None)
    left = await manager.row(machine)
    assert (left.public_key, left.bound_digest) == (None, unique_token_digest("u")), "the UUID stays bound"
    assert (await manager.refuses(replace(without, node_uuid=machine.node_uuid)))[0] is Status.PERMISSION_DENIED
    back = await manager.join(machine)
    await manager.fleet.moves.answered(IPv6Interface(back.node_address_prefix).ip)
    assert (await manager.row(machine)).public_key == machine.key


@pytest.mark.parametrize("tunnel", [False, True])
async def test_a_machine_without_a_token_gets_its_first_uuid_back_by_an_echo(tunnel: bool) -> None:
    """META 15 is written, and erased again."""
    manager, machine = Manager(), FakeMachine(tunnel=tunnel)
    first = await manager.join(machine)
    path, ended = FakePath(machine.key), list[object]()
    if tunnel:
        manager.monitor.open_stream(manager.link(first), path, ended.append)
    manager.device.hear(machine.key, path)
    await manager.handshake(machine)
    renamed = replace(machine, node_uuid=NEW_UUID)
    for actor in (renamed, machine, renamed, machine):
        manager.device.hear(machine.key)
        answer = await manager.join(actor)
        assert ended == []
        await manager.fleet.moves.answered(IPv6Interface(answer.node_address_prefix).ip)
        row = await manager.row(actor)
        assert (row.public_key, row.overlay_address) == (machine.key, IPv6Interface(answer.node_address_prefix).ip)
        link = manager.links.by_key(machine.key)
        assert link is not None
        assert (link.machine.id, link.state, link.path) == (row.id, LinkState.UP, path)
        assert manager.device.configs[machine.key].allowed_ips == (network(answer.node_address_prefix),)
        assert ended == [], "the stream goes on"
    assert len(manager.links) == 2


async def test_no_echo_moves_a_key_to_the_row_of_a_living_machine() -> None:
    manager, machine, victim = Manager(), FakeMachine(), FakeMachine()
    for one in (machine, victim):
        await manager.join(one)
        await manager.handshake(one)
    await manager.pass_time(61)
    address = IPv6Interface((await manager.join(replace(machine, node_uuid=victim.node_uuid))).node_address_prefix).ip
    manager.device.hear(victim.key)
    await manager.fleet.moves.answered(address)
    assert (await manager.row(victim)).public_key == victim.key, "it was heard again meanwhile"
    assert (await manager.row(machine)).public_key == machine.key


async def test_a_stranger_that_sends_the_key_does_not_stop_the_machines_move() -> None:
    manager, machine = Manager(), FakeMachine(source="198.51.100.7")
    await manager.join(machine)
    await manager.handshake(machine)
    address = IPv6Interface((await manager.join(replace(machine, node_uuid=NEW_UUID))).node_address_prefix).ip
    strangers = [replace(machine, node_uuid=str(uuid.uuid4()), source=f"203.0.113.{number}") for number in range(8)]
    for stranger in strangers[:3]:
        await manager.join(stranger)
    assert (await manager.refuses(strangers[3]))[0] is Status.RESOURCE_EXHAUSTED
    await manager.fleet.moves.answered(address)
    assert (await manager.row(replace(machine, node_uuid=NEW_UUID))).public_key == machine.key
    assert manager.device.configs[machine.key].allowed_ips == (IPv6Network(address),)


# --- which row is evicted


async def test_rows_without_a_handshake_exclude_nobody() -> None:
    manager = Manager(limits=MachineLimits(max_machines=200, max_pending=200))
    linked = FakeMachine()
    await manager.join(linked)
    await manager.handshake(linked)
    for _ in range(400):
        manager.time.advance(0.1)
        await manager.join(FakeMachine(source="203.0.113.66"))
    newcomer = FakeMachine()
    await manager.join(newcomer)
    await manager.handshake(newcomer)
    assert await manager.machines.find(linked.node_uuid) is not None
    assert len(manager.links) <= 200
    left = [event.reason for event in await manager.events() if isinstance(event, MachineLeft)]
    assert set(left) == {LeaveReason.EVICTED}


async def test_one_source_is_limited_only_while_more_than_half_is_used() -> None:
    manager = Manager(limits=MachineLimits(max_pending=100))
    for _ in range(51):
        await manager.join(FakeMachine(source="203.0.113.66"))
    assert (await manager.refuses(FakeMachine(source="203.0.113.66")))[0] is Status.RESOURCE_EXHAUSTED
    await manager.join(FakeMachine(source="203.0.113.67"))


async def test_with_many_sources_the_oldest_row_is_evicted() -> None:
    manager = Manager(limits=MachineLimits(max_machines=400, max_pending=400))
    first = FakeMachine(source="192.0.2.1")
    await manager.join(first)
    manager.time.advance(6)
    for number in range(399):
        await manager.join(FakeMachine(source=f"198.51.{number // 250}.{number % 250}"))
    await manager.join(FakeMachine(source="203.0.113.1"))
    assert await manager.machines.find(first.node_uuid) is None
    assert (await manager.refuses(FakeMachine(source="203.0.113.2")))[0] is Status.RESOURCE_EXHAUSTED, (
        "all others have time yet"
    )


async def test_a_thousand_machines_behind_one_address_come_back_at_once() -> None:
    before = Manager()
    machines = [FakeMachine(unique_token=f"u{number}") for number in range(1000)]
    for machine in machines:
        await before.join(machine)
        before.device.hear(machine.key, handshake=True)
    await before.monitor.check()
    reborn = [replace(machine, key=new_key()) for machine in machines]
    for machine in reborn:
        await before.join(machine)
        before.device.hear(machine.key, handshake=True)
    await before.monitor.check()
    assert set(before.device.configs) == {machine.key for machine in reborn}


# --- several servers


class Failing(MemoryStore):
    """Fails a given number of times."""

    failures = 0

    async def transact(self, work: Work[T]) -> T:
        if self.failures:
            self.failures -= 1
            raise StoreError("the disk is on fire")
        return await super().transact(work)


async def test_a_change_that_could_not_be_applied_is_tried_again() -> None:
    store = Failing()
    async with following(Manager(store=store)) as here:
        there = Manager(store=store)
        machine = FakeMachine()
        await there.join(machine)
        row = await there.row(machine)
        while machine.key not in here.device.configs:
            await here.time.sleep(0)
        store.failures = 1
        here.reconciler.on_failed(row.id)
        await here.pass_time(1)
        assert here.monitor.next_check_at == here.time.now + 2, "twice as long"
        await store.transact(lambda transaction: transaction.delete(row.id))
        await here.pass_time(2)
        assert machine.key not in here.device.configs


async def test_a_machine_that_joined_while_all_rows_are_read_again_is_kept() -> None:
    store = MemoryStore()
    manager, late = Manager(store=store), FakeMachine()
    await manager.join(FakeMachine())
    read = store.machines

    async def slow():  # type: ignore[no-untyped-def]
        async for row in read():
            yield row
        await manager.join(late)

    store.machines = slow  # type: ignore[method-assign]
    await manager.reconciler.resync(EVERYTHING)
    assert late.key in manager.device.configs
    assert not [event for event in await manager.events() if isinstance(event, MachineLeft)]


async def test_a_stream_that_names_an_address_of_another_server_waits_for_the_feed() -> None:
    store = MemoryStore()
    here, machine = Manager(store=store), FakeMachine(tunnel=True)
    there = Manager(store=store)
    await here.join(machine)
    address = (await here.row(machine)).virtual_address
    assert address is not None
    found: list[IPv6Address | None] = []

    async def look() -> None:
        link = await there.links.await_virtual_address(address)
        found.append(None if link is None else link.machine.virtual_address)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(look)
            await anyio.lowlevel.checkpoint()
            await there.reconciler.apply_change(await here.row(machine))
    assert found == [address] * 3


async def test_a_strangers_guesses_of_addresses_cost_no_query() -> None:
    class Counting(MemoryStore):
        asked = 0

        async def transact(self, work: Work[T]) -> T:
            self.asked += 1
            return await super().transact(work)

    store = Counting()
    manager = Manager(store=store)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(manager.links.await_virtual_address, IPv6Address(number))
    assert store.asked == 0


async def test_a_machine_absent_for_long_is_forgotten() -> None:
    manager, gone, alive = Manager(), FakeMachine(), FakeMachine()
    for machine in (gone, alive):
        await manager.join(machine)
        await manager.handshake(machine)
    for _ in range(30):
        await manager.pass_time(200)
        manager.device.hear(alive.key)
    await manager.machines.forget_absent_now(5000)
    assert await manager.machines.find(gone.node_uuid) is None
    assert await manager.machines.find(alive.node_uuid) is not None
    assert [event.reason for event in await manager.events() if isinstance(event, MachineLeft)] == [LeaveReason.LONG_GONE]


async def test_unproven_moves_leave_nothing_behind() -> None:
    manager, machine = Manager(), FakeMachine()
    first = await manager.join(machine)
    await manager.handshake(machine)
    addresses = []
    for number in range(3):
        answer = await manager.join(replace(machine, node_uuid=f"11111111-2222-4333-8444-{number:012}", tunnel=True))
        addresses.append(parse_peer_addr_port(answer.grpc_peer_addr_port)[0])
    found = [manager.links.by_virtual_address(address) is not None for address in addresses]
    assert found == [False, False, True]
    await pass_time_of_moves(manager, 61)
    assert all(manager.links.by_virtual_address(address) is None for address in addresses)
    assert manager.device.configs[machine.key].allowed_ips == (network(first.node_address_prefix),)


async def test_a_move_that_gives_way_to_another_keys_leaves_no_address_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siderolink.server.fleet.moves.MAX_MOVES", 1)
    manager, first, second = Manager(), FakeMachine(), FakeMachine()
    for machine in (first, second):
        await manager.join(machine)
        await manager.handshake(machine)
        await manager.join(replace(machine, node_uuid=str(uuid.uuid4())))
        manager.time.advance(6)
    await pass_time_of_moves(manager)
    assert [len(manager.device.configs[machine.key].allowed_ips) for machine in (first, second)] == [1, 2]


async def test_a_move_whose_address_the_device_refused_ends_like_others() -> None:
    manager, machine = Manager(), FakeMachine(tunnel=True)
    await manager.join(machine)
    await manager.handshake(machine)
    manager.device.fails_with = DeviceError("no buffer space available")
    with pytest.raises(GRPCError):
        await manager.join(replace(machine, node_uuid=NEW_UUID))
    manager.device.fails_with = None
    moves, pinged = manager.fleet.moves, list[IPv6Address]()
    async with background_tasks() as tasks:
        tasks.start_soon(moves.run, pinged.append)
        with anyio.fail_after(30):
            while not pinged or moves.awaits(pinged[0]):
                await anyio.lowlevel.checkpoint()


async def test_a_move_that_the_store_failed_takes_its_address_back() -> None:
    store = Failing()
    manager, machine = Manager(store=store), FakeMachine()
    first = await manager.join(machine)
    await manager.handshake(machine)
    second = await manager.join(replace(machine, node_uuid=NEW_UUID))
    assert len(manager.device.configs[machine.key].allowed_ips) == 2
    store.failures = 1
    await manager.fleet.moves.answered(IPv6Interface(second.node_address_prefix).ip)
    assert store.failures == 0
    assert manager.device.configs[machine.key].allowed_ips == (network(first.node_address_prefix),)


async def test_an_answer_that_comes_too_late_moves_nothing_and_the_address_is_taken_back() -> None:
    manager, machine = Manager(), FakeMachine()
    first = await manager.join(machine)
    await manager.handshake(machine)
    second = await manager.join(replace(machine, node_uuid=NEW_UUID))
    manager.time.advance(61)
    moves = manager.fleet.moves
    await moves.answered(IPv6Interface(second.node_address_prefix).ip)
    assert await manager.machines.find(NEW_UUID) is None
    await pass_time_of_moves(manager)
    assert manager.device.configs[machine.key].allowed_ips == (network(first.node_address_prefix),)


# --- machines without a unique token are pending


@pytest.mark.parametrize("mode", [JoinTokensMode.LEGACY_ALLOWED, JoinTokensMode.STRICT])
@pytest.mark.parametrize("tunnel", [False, True])
async def test_a_known_key_with_another_uuid_and_no_token_is_pending_once_it_answers(
    mode: JoinTokensMode, tunnel: bool
) -> None:
    """It gets a token then, and is accepted with it: nothing waits for its restart."""
    before, machine = Manager(), FakeMachine(tunnel=tunnel)
    await before.join(machine)
    await before.handshake(machine)
    manager = Manager(store=before.store, time=before.time, mode=mode)
    await manager.reconciler.load()
    path, ended = FakePath(machine.key), list[object]()
    if tunnel:
        manager.monitor.open_stream(manager.link(await manager.join(machine)), path, ended.append)
    manager.device.hear(machine.key, path)
    await manager.handshake(machine)
    first = await manager.row(machine)
    renamed = replace(machine, node_uuid=NEW_UUID, unique_token=None)
    answer = await manager.join(renamed)
    address = IPv6Interface(answer.node_address_prefix).ip
    assert address != first.overlay_address
    assert await manager.row(machine) == first, "nothing changes until then"
    assert len(manager.links) == 1
    told: list[Machine] = []
    with manager.fleet.sessions.watching(lambda link: told.append(link.machine)):
        await manager.fleet.moves.answered(address)
    link = manager.links.by_key(machine.key)
    assert link is not None
    assert (link.machine.node_uuid, link.machine.admission) == (NEW_UUID, MachineAdmission.PENDING)
    assert (link.machine.overlay_address, link.state, ended) == (address, LinkState.UP, [])
    assert link.machine in told, "so that it is given a token now"
    assert (await manager.row(machine)).public_key is None
    given = '{"Fingerprint":"aa","Token":"given"}'

    async def assign(transaction: Transaction) -> Machine:
        return await transaction.update(replace(link.machine, assigned_token=given))

    await manager.reconciler.apply_change(await manager.store.transact(assign))
    assert (await manager.join(replace(renamed, unique_token=given))).node_address_prefix == answer.node_address_prefix
    assert (await manager.row(renamed)).public_key == machine.key


async def test_a_known_key_that_takes_a_living_machines_uuid_is_pending_and_in_conflict() -> None:
    manager, one, other = Manager(mode=JoinTokensMode.STRICT), FakeMachine(), FakeMachine()
    for machine in (one, other):
        await manager.join(machine)
        await manager.handshake(machine)
        link = manager.links.by_key(machine.key)
        assert link is not None
        await manager.admin.accept(link.machine.id)
    answer = await manager.join(replace(other, node_uuid=one.node_uuid))
    await manager.fleet.moves.answered(IPv6Interface(answer.node_address_prefix).ip)
    link = manager.links.by_key(other.key)
    assert link is not None
    assert (link.machine.admission, link.machine.has_uuid_conflict) == (MachineAdmission.PENDING, True)
    assert (await manager.row(one)).public_key == one.key


async def test_with_pending_machines_a_caller_that_only_read_a_key_moves_nothing() -> None:
    manager, machine = Manager(mode=JoinTokensMode.STRICT), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    link = manager.links.by_key(machine.key)
    assert link is not None
    row = await manager.admin.accept(link.machine.id)
    for number in range(3):
        await manager.join(replace(machine, node_uuid=str(uuid.uuid4()), source=f"203.0.113.{number}"))
    await manager.fleet.moves.answered(row.overlay_address)
    assert (await manager.row(machine)).public_key == machine.key
    assert len(manager.links) == 1


async def test_echoes_do_not_exceed_the_limit_of_machines() -> None:
    manager, machine = Manager(limits=MachineLimits(max_machines=2)), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    answer = await manager.join(replace(machine, node_uuid=NEW_UUID))
    await manager.fleet.moves.answered(IPv6Interface(answer.node_address_prefix).ip)
    status, _ = await manager.refuses(replace(machine, node_uuid=str(uuid.uuid4())))
    assert status is Status.RESOURCE_EXHAUSTED
    assert len(manager.links) == 2
