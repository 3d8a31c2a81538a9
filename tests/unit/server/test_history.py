"""The history records events of machines besides joins, and counts repetitions."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeVar

import anyio
import pytest

from siderolink.common.errors import ConfigurationError, StoreError
from siderolink.common.tasks import background_tasks
from siderolink.server import HistoryEntry, HistoryKind, HistoryOptions, JoinRefusal, JoinRefused, MachineLimits, MemoryStore
from siderolink.server.clock import RetentionTime
from siderolink.server.events import EventsLost, HandshakeCompleted
from siderolink.server.history import QUEUE_LIMIT, History
from siderolink.server.store.base import Work
from tests.support.fake_device import FakePath
from tests.support.manager import FakeMachine, Manager, managed

pytestmark = pytest.mark.anyio

T = TypeVar("T")


class NamedPath(FakePath):
    """A UDP endpoint, or anything else for a tunnel."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __str__(self) -> str:
        return self._name


def made(manager: Manager, options: HistoryOptions | None = None) -> History:
    return History(manager.store, manager.machines.named, options or HistoryOptions(), manager.hub.subscribe(QUEUE_LIMIT))


async def noted(history: History, machine: str | None = None) -> list[HistoryEntry]:
    """All of it, the oldest first."""
    await history.aclose()
    return list(await history.entries(machine, after_seq=0))


def told(entries: Sequence[HistoryEntry]) -> list[tuple[str, str]]:
    return [(str(entry.kind), entry.detail) for entry in entries]


async def test_the_history_has_each_change_of_a_machine_with_its_reason() -> None:
    manager = Manager(limits=MachineLimits(down_after=100.0))
    history = made(manager)
    machine = FakeMachine(unique_token="u")
    await manager.join(machine)
    manager.device.hear(machine.key, NamedPath("198.51.100.7:1000"))
    await manager.handshake(machine)
    await manager.handshake(machine)  # a renewed session makes no entry
    await manager.pass_time(100)
    row = await manager.row(machine)
    manager.device.hear(machine.key, NamedPath("203.0.113.9:1000"))
    await manager.handshake(machine)
    manager.device.hear(machine.key, NamedPath("tunnel"))
    link = manager.links.get(row.id)
    assert link is not None
    manager.links.set_source(link, "203.0.113.9")
    await manager.handshake(machine)
    manager.monitor.said_goodbye(link)
    await manager.join(replace(machine, key=FakeMachine().key), talos_version="v1.14.0")
    await manager.machines.remove(row.id)
    found = await noted(history, machine.node_uuid)
    address = str(row.overlay_address)
    assert [(kind, detail) for kind, detail in told(found) if kind not in ("taken over", "joined", "version")] == [
        ("up", address),
        ("bound", "its unique token"),
        ("down", "silent for too long"),
        ("address", "203.0.113.9, before 198.51.100.7"),
        ("up", address),
        ("transport", "tunnel, before udp"),
        ("down", "said goodbye"),
        ("left", "removed"),
    ]
    joined = [entry for entry in found if entry.kind is HistoryKind.JOINED]
    assert joined[0].detail == f"new machine at {address}"
    assert (joined[0].version, joined[0].transport) == ("v1.13.0", "udp")
    assert row.join_token_digest is not None
    assert {entry.join_token for entry in joined} == {f"given ({row.join_token_digest.hex()[:12]})"}
    assert {entry.machine_id for entry in found} == {row.id}
    assert next(entry.source for entry in found if entry.kind is HistoryKind.UP) == "198.51.100.7"


async def test_a_changed_version_is_recorded_beside_the_one_in_the_row() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    history = made(manager)  # as after a restart
    await history.know([[link.machine for link in manager.links]])
    await manager.pass_time(1000)
    await manager.join(machine, talos_version="v1.14.0")
    await manager.join(replace(machine, key=FakeMachine().key), talos_version="v1.14.0")
    assert ("version", "v1.14.0, before v1.13.0") in told(await noted(history))


async def test_a_takeover_of_a_row_is_recorded_with_its_basis_and_source() -> None:
    manager, machine = Manager(), FakeMachine(unique_token="u")
    await manager.join(machine)
    await manager.handshake(machine)
    history = made(manager)
    reborn = replace(machine, key=FakeMachine().key, source="198.51.100.99")
    await manager.join(reborn)
    await manager.handshake(reborn)
    (entry,) = [entry for entry in await noted(history, machine.node_uuid) if entry.kind is HistoryKind.TAKEN_OVER]
    assert entry.detail.startswith("unique token; before from ")
    assert entry.source == "198.51.100.99:1"


async def test_refused_joins_are_found_by_their_uuid_and_counted_in_one_entry() -> None:
    manager, machine = Manager(), FakeMachine()
    await manager.join(machine)
    await manager.handshake(machine)
    history = made(manager)
    for _ in range(50):
        await manager.refuses(machine, join_token="wrong")
    (entry,) = await noted(history, machine.node_uuid)
    assert (entry.kind, entry.machine_id, entry.count) == (HistoryKind.REFUSED, "", 50)
    assert entry.source.startswith(machine.source)
    assert entry.detail.startswith(str(JoinRefusal.INVALID_JOIN_TOKEN))


async def test_a_flood_of_different_refusals_makes_a_bounded_number_of_entries() -> None:
    manager = Manager()
    history = made(manager, HistoryOptions(max_refusals=10))
    for number in range(1000):
        history.note(
            JoinRefused(reason=JoinRefusal.INVALID_JOIN_TOKEN, node_uuid=f"u-{number}", source="\x1b[31m192.0.2.1\N{BOM}")
        )
    found = await noted(history)
    assert [entry.kind for entry in found] == [HistoryKind.REFUSED] * 10 + [HistoryKind.LOST]
    assert found[-1].count == 990
    assert found[0].source == " [31m192.0.2.1 "


class Away(MemoryStore):
    """A store that does not answer for a while."""

    is_away = False

    async def transact(self, work: Work[T]) -> T:
        if self.is_away:
            raise StoreError("the store is away")
        return await super().transact(work)


@asynccontextmanager
async def running(history: History) -> AsyncIterator[None]:
    async with background_tasks() as tasks:
        tasks.start_soon(history.run)
        yield


async def test_entries_wait_for_an_absent_store_up_to_a_bound_and_the_rest_is_counted() -> None:
    store = Away()
    manager = Manager(store=store)
    history = made(manager, HistoryOptions(write_after=0.01, max_waiting=5))
    machines = [FakeMachine() for _ in range(8)]
    async with running(history):
        for machine in machines:
            await manager.join(machine)
        store.is_away = True
        with anyio.fail_after(30):
            while history.counters().failures < 3:
                await anyio.sleep(0.01)
        counters = history.counters()
        assert (counters.written, counters.waiting, counters.lost) == (0, 5, 3)
        with pytest.raises(StoreError):
            await history.entries()
        store.is_away = False
        with anyio.fail_after(30):
            while history.counters().written < 5:
                await anyio.sleep(0.01)
    assert [entry.node_uuid for entry in await noted(history)] == [machine.node_uuid for machine in machines[:5]]


async def test_a_storm_of_joins_waits_for_no_entry_and_all_are_written_in_few_transactions() -> None:
    manager = Manager()
    history = made(manager, HistoryOptions(write_after=0.01))
    transactions = 0
    transact = manager.store.transact

    async def counted(work: Work[T]) -> T:
        nonlocal transactions
        transactions += 1
        return await transact(work)

    machines = [FakeMachine() for _ in range(300)]
    for machine in machines:
        await manager.join(machine)
        await manager.handshake(machine)
    assert history.counters().waiting == 0  # nothing was written while they joined
    manager.store.transact = counted  # type: ignore[method-assign]
    assert len(await noted(history)) == 600
    assert transactions == 2


async def test_lost_events_are_recorded() -> None:
    history = made(Manager())
    history.note(EventsLost(count=7))
    assert told(await noted(history)) == [("lost", "7 events were not noted")]
    assert history.counters().lost == 7


async def test_one_machine_s_history_is_deleted_and_the_others_stay_and_old_entries_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetentionTime, "KEPT_SECONDS", 0.0)
    manager, machines = Manager(), [FakeMachine(), FakeMachine()]
    history = made(manager, HistoryOptions(max_age=3600.0))
    for machine in machines:
        await manager.join(machine)
        await manager.handshake(machine)
    await history.aclose()
    assert await history.delete(machines[0].node_uuid) == 2
    assert await history.entries(machines[0].node_uuid) == []
    assert len(await history.entries(machines[1].node_uuid)) == 2
    manager.store.time = lambda: 4e9  # type: ignore[method-assign]
    await history.prune()  # a jump of the clock, which counts once it has lasted
    assert len(await history.entries()) == 2
    await history.prune()
    assert await history.entries() == []
    assert history.counters().pruned == 2


async def test_many_entries_at_once_are_pruned_early() -> None:
    manager = Manager()
    history = made(manager, HistoryOptions(write_after=0.001, total=10, prune_after=30))
    async with running(history):
        for _ in range(30):
            await manager.join(FakeMachine())
        with anyio.fail_after(30):
            while history.counters().pruned < 20:
                await anyio.sleep(0.01)
        assert len(await history.entries()) == 10


def test_bounds_of_zero_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="per_machine of the history must be at least 1"):
        HistoryOptions(per_machine=0)


async def test_entries_name_the_stored_token() -> None:
    manager, tokens = managed()
    history = made(manager)
    made_token = await tokens.create("spring", token="a-secret-of-spring")
    machine = FakeMachine()
    await manager.join(machine, join_token=made_token.secret)
    await manager.join(FakeMachine())
    spring, given = [entry.join_token for entry in await noted(history)]
    assert spring.startswith("spring (")
    assert given.startswith("given (")
    assert "a-secret-of-spring" not in spring + given


async def test_entries_share_a_token_s_name_and_python_does_not_keep_it_forever() -> None:
    manager = Manager()
    history = made(manager)
    for _ in range(2):
        await manager.join(FakeMachine())
    first, second = [entry.join_token for entry in await noted(history)]
    assert first.startswith("given (")
    assert first is second
    unseen = "".join([first[:1], first[1:]])
    assert sys.intern(unseen) is unseen, "else it was interned: from Python 3.12 on, nothing frees it"


async def test_an_ipv4_address_that_an_older_server_stored_as_ipv6_is_the_same() -> None:
    store, machine = MemoryStore(), FakeMachine(tunnel=True)
    before = Manager(store=store)
    await before.join(machine)
    await before.handshake(machine)
    row = replace(await before.row(machine), last_source="::ffff:198.51.100.7")
    await store.transact(lambda transaction: transaction.update(row))
    manager = Manager(store=store)
    await manager.reconciler.load()
    assert "198.51.100.7" in manager.links.sources
    history = made(manager)
    await history.know([[row]])
    manager.hub.publish(HandshakeCompleted(machine=row, is_first=True, source="198.51.100.7", is_tunnel=True))
    assert [entry.kind for entry in await noted(history)] == [HistoryKind.UP]
