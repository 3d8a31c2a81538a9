"""The stored state of a server and its machines, and its use after a start; in virtual time."""

import math
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from ipaddress import ip_address

import anyio
import pytest

from siderolink.common.errors import StoreError
from siderolink.common.keys import PrivateKey
from siderolink.common.wireguard.device import HandshakeGaveUp, PathChanged, PeerConfig
from siderolink.common.wireguard.noise.tai64n import Timestamps, later
from siderolink.server.clock import Clock
from siderolink.server.fleet.dialling import Pace, Window, dial_remembered
from siderolink.server.fleet.directory import LinkState
from siderolink.server.fleet.last_seen import LastSeenNotes
from siderolink.server.fleet.sessions import udp_endpoint
from siderolink.server.store import LastSeen, Machine, MemoryStore, ServerRecord
from siderolink.server.store.base import T, Work
from siderolink.server.store.server_record import recall_server, resume_timestamps, rotate_key
from tests.support.fake_device import FakePath
from tests.support.manager import FakeMachine, Manager

pytestmark = pytest.mark.anyio

NOW = 1_700_000_000 * 10**9


class Place(FakePath):
    """A path with a name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __str__(self) -> str:
        return self._name


# --- the server itself


async def test_a_key_is_made_once_and_remembered() -> None:
    store = MemoryStore()
    first = await recall_server(store, None, None)
    assert await recall_server(store, None, None) == first
    assert first.installation_id == ""
    given = PrivateKey.generate()
    assert (await recall_server(store, given, None)).private_key == given
    assert (await recall_server(store, None, "")).private_key == given
    assert await rotate_key(store) == (await recall_server(store, None, None)).private_key != given


async def test_a_store_of_another_installation_is_refused() -> None:
    store = MemoryStore()
    await recall_server(store, None, "here")
    assert (await recall_server(store, None, None)).installation_id == "here"
    with pytest.raises(StoreError, match="belongs to the installation 'here', not 'there'"):
        await recall_server(store, None, "there")


async def test_without_a_server_record_no_key_is_rotated() -> None:
    with pytest.raises(StoreError, match="no server yet"):
        await rotate_key(MemoryStore())


def test_timestamps_rise_over_a_crash_though_the_clock_goes_back() -> None:
    before = Timestamps()
    written = before.next(NOW)
    unwritten = [before.next(NOW + seconds * 10**9) for seconds in range(5)]
    after = resume_timestamps(
        ServerRecord(private_key=bytes(PrivateKey.generate()), installation_id="", timestamp_mark=written)
    )
    assert after.next(NOW - 3600 * 10**9) > max(unwritten)


def test_the_timestamp_that_means_never_is_not_moved() -> None:
    assert later(bytes(12), 5) == bytes(12)


# --- where machines were heard


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("192.0.2.7:1234", "192.0.2.7:1234"),
        ("[2001:db8::7]:1234", "[2001:db8::7]:1234"),
        ("[fe80::7%3]:1234", "[fe80::7%3]:1234"),
        ("tunnel [fdae:41e4:649b:9304::7]:50888", None),
    ],
)
def test_only_udp_paths_are_stored_as_endpoints(path: str, endpoint: str | None) -> None:
    assert udp_endpoint(Place(path)) == endpoint


async def test_the_last_endpoint_of_a_machine_is_stored() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    last_seen = LastSeenNotes(manager.store)
    manager = Manager(store=manager.store, last_seen=last_seen, time=manager.time)
    await manager.reconciler.load()
    heard(manager, machine, "192.0.2.7:1234")
    await manager.handshake(machine)
    await last_seen.write()
    row = await manager.row(machine)
    assert (row.last_endpoint, row.last_handshake_at, row.seen_at) == ("192.0.2.7:1234", 1_000_000.0, 1_000_000.0)
    manager.time.advance(5)
    heard(manager, machine, "tunnel [fdae:41e4:649b:9304::7]:50888")
    await last_seen.write()
    row = await manager.row(machine)
    assert (row.last_endpoint, row.last_handshake_at, row.seen_at) == (None, 1_000_000.0, 1_000_005.0)


async def test_last_seen_times_are_written_in_batches_and_at_the_end() -> None:
    store = MemoryStore()
    stamps = Timestamps()
    await recall_server(store, None, None)
    last_seen = LastSeenNotes(store, stamps, write_after=0.01)
    machine = FakeMachine()
    await Manager(store=store).join(machine)
    row = await Manager(store=store).row(machine)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(last_seen.run)
        mark = stamps.next(NOW)
        last_seen.add(row.id, LastSeen(endpoint="192.0.2.7:1", seen_at=1.0, handshake_at=1.0))
        last_seen.add(row.id, LastSeen(endpoint="192.0.2.7:2", seen_at=2.0))
        while (seen := await Manager(store=store).row(machine)).seen_at is None:
            await anyio.sleep(0.01)
        assert (seen.last_endpoint, seen.last_handshake_at, seen.revision) == ("192.0.2.7:2", 1.0, row.revision)
        tasks.cancel_scope.cancel()
    last_seen.add(row.id, LastSeen(endpoint=None, seen_at=3.0))
    await last_seen.aclose()
    assert (await Manager(store=store).row(machine)).seen_at == 3.0
    assert (await recall_server(store, None, None)).timestamp_mark == mark


async def test_a_failing_store_loses_only_last_seen_times(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryStore):
        async def transact(self, work: Work[T]) -> T:
            raise StoreError("the disk is full")

    last_seen = LastSeenNotes(Full())
    last_seen.add("1", LastSeen(endpoint=None, seen_at=3.0))
    await last_seen.write()
    assert "could not be stored" in caplog.text


async def test_a_first_handshake_while_the_store_is_away_is_recorded_when_it_is_back() -> None:
    class Away(MemoryStore):
        is_away = False

        async def transact(self, work: Work[T]) -> T:
            if self.is_away:
                raise StoreError("the database does not answer")
            return await super().transact(work)

    store = Away()
    manager, machine = Manager(store=store), FakeMachine()
    await manager.join(machine)
    store.is_away = True
    await manager.handshake(machine)
    store.is_away = False
    assert (await manager.row(machine)).linked_at is None
    await manager.pass_time(2)
    assert (await manager.row(machine)).linked_at is not None


# --- dialling


async def remembered(manager: Manager, endpoint: str | None, seen_at: float, *, tunnel: bool = False) -> Machine:
    """A row of a machine that was linked before the start."""
    machine = FakeMachine(tunnel=tunnel)
    await manager.join(machine)
    await manager.handshake(machine)
    row = await manager.row(machine)
    await manager.store.transact(
        lambda transaction: transaction.note(
            {row.id: LastSeen(endpoint=endpoint, seen_at=seen_at, handshake_at=seen_at)}, seen_at
        )
    )
    return await manager.row(machine)


async def dial_all(manager: Manager, pace: Pace | None = None, clock: Clock | None = None) -> None:
    fleet = manager.fleet
    await dial_remembered(fleet.directory, fleet.sessions, fleet.reconciler, pace, clock)


def dialled(manager: Manager) -> list[PeerConfig]:
    return [config for config in manager.device.given if config.endpoint and config.persistent_keepalive]


async def test_the_last_seen_is_dialled_first() -> None:
    before = Manager()
    rows = [await remembered(before, f"192.0.2.{number}:{number}", seen_at=number) for number in (2, 3, 1)]
    await remembered(before, None, seen_at=9)
    await remembered(before, "192.0.2.9:9", seen_at=9, tunnel=True)
    await remembered(before, "nonsense", seen_at=9)
    after = Manager(store=before.store)
    await after.reconciler.load()
    assert {link.state for link in after.links} == {LinkState.DOWN}
    await dial_all(after, Pace(count=2, pause=0.001))
    expected = [(ip_address(f"192.0.2.{number}"), number) for number in (3, 2, 1)]
    assert [config.endpoint for config in dialled(after)] == expected
    keys = {row.public_key for row in rows}
    assert {config.public_key for config in dialled(after)} == keys


async def test_machines_that_connected_or_left_are_not_dialled() -> None:
    before = Manager()
    first, second, third = [await remembered(before, f"192.0.2.{number}:1", seen_at=-number) for number in (1, 2, 3)]
    after = Manager(store=before.store)
    await after.reconciler.load()
    assert second.public_key is not None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(dial_all, after, Pace(count=1, pause=0.05))
        while not dialled(after):
            await anyio.sleep(0.001)
        after.device.hear(second.public_key, handshake=True)
        await after.machines.remove(third.id)
    assert [config.public_key for config in dialled(after)] == [first.public_key]


def dials(answer_after: Callable[[int], float], count: int, *, service_time: float = 0.0) -> tuple[list[float], int]:
    """When each of `count` machines is dialled, in virtual time, and how many dials were unanswered at most.

    `answer_after` says, of a machine's number, how long its answer is under way; it is then read when all before it have been,
    which takes `service_time` for each.
    """
    window, now, free_at = Window(), 0.0, 0.0
    made: list[float] = []
    answers: list[tuple[float, int]] = []
    most = 0
    while len(made) < count:
        opens_at = window.opens_at(now)
        if answers and answers[0][0] <= max(now, opens_at):
            at, number = heappop(answers)
            now = max(now, at)
            window.settled(str(number), now)
        elif opens_at > now:
            now = opens_at
        else:
            window.dialled(str(len(made)), now)
            comes_at = now + answer_after(len(made))
            if comes_at < math.inf:
                free_at = max(free_at, comes_at) + service_time
                heappush(answers, (free_at, len(made)))
            most = max(most, len(answers))
            made.append(now)
            now += 0.001
    return made, most


def test_prompt_answers_do_not_delay_dialling() -> None:
    made, _ = dials(lambda number: 0.05, 10_000)
    assert made[-1] < 10.1
    made, _ = dials(lambda number: 0.4, 10_000)
    assert made[-1] < 12


def test_absent_machines_delay_others_by_seconds_only() -> None:
    made, _ = dials(lambda number: math.inf if number < 1000 else 0.05, 2000)
    assert made[1000] < 11
    made, _ = dials(lambda number: math.inf if number % 2 else 0.05, 10_000)
    assert made[-1] < 20


@pytest.mark.parametrize("service_time", [0.002, 0.005, 0.02])
def test_queued_answers_slow_dialling_down(service_time: float) -> None:
    """What waits to be read never waits for 5 s, after which dials are repeated and make the queue longer."""
    made, most = dials(lambda number: 0.05, 5_000, service_time=service_time)
    assert most * service_time < 4
    assert made[-1] < 5_000 * service_time


async def test_a_dial_waits_for_room_until_another_is_settled() -> None:
    before = Manager()
    rows = [await remembered(before, f"192.0.2.1:{number + 1}", seen_at=-number) for number in range(Window.LEAST + 2)]
    after = Manager(store=before.store)
    await after.reconciler.load()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(
            dial_remembered,
            after.fleet.directory,
            after.fleet.sessions,
            after.fleet.reconciler,
            Pace(count=1000),
            after.time.clock,
        )
        while len(dialled(after)) < Window.LEAST:
            await anyio.sleep(0.001)
        await anyio.sleep(0.01)
        assert len(dialled(after)) == Window.LEAST
        key = rows[7].public_key
        assert key is not None
        after.device.hear(key, handshake=True)
        while len(dialled(after)) < Window.LEAST + 2:  # one for the answer, one more as it was prompt
            await anyio.sleep(0.001)
    assert [config.public_key for config in dialled(after)] == [row.public_key for row in rows]


async def test_an_absent_machines_keepalive_is_switched_off() -> None:
    before = Manager()
    row = await remembered(before, "192.0.2.1:1", seen_at=1)
    assert row.public_key is not None
    after = Manager(store=before.store)
    await after.reconciler.load()
    await dial_all(after)

    def keepalive() -> int:
        assert row.public_key is not None
        return after.device.configs[row.public_key].persistent_keepalive

    assert keepalive() == 25
    after.monitor.on_device_event(HandshakeGaveUp(public_key=row.public_key))
    await after.monitor.check()
    assert keepalive() == 0
    after.device.hear(row.public_key, handshake=True)
    await after.monitor.check()
    assert keepalive() == 25
    after.monitor.on_device_event(HandshakeGaveUp(public_key=row.public_key))
    await after.monitor.check()
    assert keepalive() == 25, "a link that is up is not given up so soon"


def heard(manager: Manager, machine: FakeMachine, place: str) -> None:
    manager.monitor.on_device_event(PathChanged(public_key=machine.key, old=None, new=Place(place)))


def test_a_last_seen_time_does_not_replace_the_first_handshake() -> None:
    row = Machine(id="1", node_uuid="u", public_key=None, overlay_address=ip_address("fd00::1"), created_at=0, joined_at=0)  # type: ignore[arg-type]
    seen = LastSeen(endpoint="a:1", seen_at=2.0, handshake_at=1.0).of(row, 2.0)
    assert LastSeen(endpoint=None, seen_at=3.0).of(seen, 3.0) == replace(seen, last_endpoint=None, seen_at=3.0)
