"""What concerns many rows, changes or reports at once takes many turns of the event loop. Counted, not timed."""

from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

import anyio.lowlevel
import pytest

from siderolink.common.grpc import GrpcChannel
from siderolink.common.pb.siderolink.admin import v1 as pb
from siderolink.server import HistoryOptions, MemoryStore
from siderolink.server.admin import bans
from siderolink.server.admin.following import Follower
from siderolink.server.admin.hostnames import Hostnames
from siderolink.server.admin.machines import MachineAdministration
from siderolink.server.clock import Clock
from siderolink.server.events import EventHub, EventsLost
from siderolink.server.fleet.limit_watch import LimitWatch
from siderolink.server.fleet.reconciler import EVERYTHING
from siderolink.server.history import QUEUE_LIMIT, History
from siderolink.server.reporting.ingest import ReportIngest
from siderolink.server.reporting.model import ReportDrop, ReportOptions
from siderolink.server.store import (
    AuditEntry,
    Ban,
    BanChanged,
    HistoryEntry,
    HistoryKind,
    Machine,
    Principal,
    Role,
    Transaction,
)
from siderolink.server.store.audit import SERVER
from siderolink.server.store.sql.postgres import PostgresStore, feed
from tests.support.admin_server import open_admin_server
from tests.support.crowd import open_crowd
from tests.support.manager import FakeMachine, Manager, managed
from tests.support.postgres import STATE_KEY, cluster
from tests.support.several import fleet_of, membership, owners
from tests.support.turns import counting_turns

pytestmark = pytest.mark.anyio

MANY = 600
AT_ONCE = 256


async def joined(manager: Manager, count: int) -> list[Machine]:
    machines = [FakeMachine() for _ in range(count)]
    for machine in machines:
        await manager.join(machine)
    return [await manager.row(machine) for machine in machines]


# --- the store's rows and changes


async def test_rows_that_are_read_again_are_applied_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the database was away: all of them may have changed."""
    store = MemoryStore()
    await joined(Manager(store=store), MANY)
    late = Manager(store=store)
    async with counting_turns() as turns:
        monkeypatch.setattr(late.device, "set_peer", turns.counted(late.device.set_peer))
        await late.reconciler.resync(EVERYTHING)
    assert turns.total == MANY
    assert turns.most <= 64


async def test_changes_that_wait_are_followed_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server may change thousands of rows at once."""
    store = MemoryStore()
    here, there = Manager(store=store), Manager(store=store)
    async with counting_turns() as turns, anyio.create_task_group() as tasks:
        monkeypatch.setattr(there.device, "set_peer", turns.counted(there.device.set_peer))
        await tasks.start(there.reconciler.follow)
        async with store.changes() as changes:
            await joined(here, MANY)
            for _ in range(MANY):
                await anext(changes)
        while turns.total < MANY:
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert turns.most <= 64


async def test_changes_are_parsed_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ban_all(transaction: Transaction) -> None:
        for number in range(MANY):
            await transaction.set_banned(Ban(value=str(number)), True)

    with cluster().database() as database:
        url = cluster().url(database)
        async with (
            PostgresStore.open(url, key=STATE_KEY) as store,
            PostgresStore.open(url, key=STATE_KEY) as other,
            store.changes() as changes,
            counting_turns() as turns,
        ):
            monkeypatch.setattr(feed, "Ban", turns.counted(Ban))
            await other.transact(ban_all)
            found = [await anext(changes) for _ in range(MANY)]
    assert {change.ban.value for change in found if isinstance(change, BanChanged)} == set(map(str, range(MANY)))
    assert turns.total >= MANY
    assert turns.most <= 2 * 64, "both stores read them"


async def test_tokens_are_hashed_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, tokens = managed()
    for number in range(MANY):
        await tokens.create(f"token-{number}")
    async with counting_turns() as turns:
        monkeypatch.setattr(manager.links.known, "set_token", turns.counted(manager.links.known.set_token))
        await manager.links.known.load_tokens(manager.store)
    assert turns.total == MANY
    assert turns.most <= 128


async def test_a_token_that_changes_while_many_are_read_again_keeps_its_change() -> None:
    manager, tokens = managed()
    for number in range(MANY):
        await tokens.create(f"token-{number:03}")
    last = f"token-{MANY - 1}"
    secret = await tokens.show(last)
    await tokens.revoke(last)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(manager.links.known.load_tokens, manager.store)
        await anyio.lowlevel.checkpoint()  # all are read, and some of them applied
        await tokens.reinstate(last)
    await manager.join(FakeMachine(), join_token=secret)


async def test_machines_of_a_dead_server_are_looked_at_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:

    async def dial_none(*_: object, **__: object) -> None:
        pass

    async with fleet_of("a", "b") as fleet:
        rows = await joined(fleet["a"], MANY)
        here, there = owners(fleet["a"]), owners(fleet["b"])
        for row in rows:
            link = fleet["a"].links.get(row.id)
            assert link is not None
            here.heard(link, is_new_session=True)
        await here.settle()
        async with counting_turns() as turns:
            monkeypatch.setattr(membership(fleet["b"]), "heir", turns.counted(membership(fleet["b"]).heir))
            with monkeypatch.context() as patched:
                patched.setattr(membership(fleet["b"]), "is_alive", lambda server_id: server_id == "b")
                patched.setattr("siderolink.server.fleet.failover.dial_links", dial_none)
                patched.setattr("siderolink.server.fleet.failover._parse", lambda endpoint: (IPv6Address("::1"), 1))
                failover = fleet["b"].fleet.failover
                assert failover is not None
                await failover.take_over("a")
            assert turns.total >= MANY
            assert turns.most <= 3 * 64
        async with counting_turns() as turns:
            monkeypatch.setattr(there, "update", turns.counted(there.update))
            await there.load()
            assert turns.total >= MANY
            assert turns.most <= 3 * 128, "the feed may report some in the same turn"


# --- lists


async def ban_many(transaction: Transaction) -> None:
    for number in range(MANY):
        await transaction.set_banned(Ban(value=f"{number:04}"), True)


async def audit_many(transaction: Transaction) -> None:
    for number in range(MANY):
        await transaction.audit(AuditEntry(at=1.0, actor=SERVER, action="a", object_kind="k", object_id=str(number)))


async def remember_many(transaction: Transaction) -> None:
    entry = HistoryEntry(at=1.0, machine_id="m", node_uuid="u", kind=HistoryKind.UP)
    await transaction.add_history([entry] * MANY)


async def make_many_keys(transaction: Transaction) -> None:
    for number in range(MANY):
        key = Principal(id=str(number), name=str(number), role=Role.VIEWER, key_digest=str(number).encode(), created_at=1.0)
        await transaction.put_principal(key)


LISTS: dict[str, tuple[Callable[[Transaction], Awaitable[None]], str, Callable[[GrpcChannel], Awaitable[Any]]]] = {
    "bans": (ban_many, "BanEntry", lambda channel: pb.BanServiceStub(channel).list_bans(pb.ListBansRequest(page_size=1000))),
    "the audit": (
        audit_many,
        "AuditEntry",
        lambda channel: pb.AuditServiceStub(channel).list_audit(pb.ListAuditRequest(page_size=1000)),
    ),
    "the history": (
        remember_many,
        "HistoryEntry",
        lambda channel: pb.HistoryServiceStub(channel).list_history(pb.ListHistoryRequest(page_size=1000)),
    ),
    "API keys": (
        make_many_keys,
        "ApiKey",
        lambda channel: pb.ApiKeyServiceStub(channel).list_api_keys(pb.ListApiKeysRequest(page_size=1000)),
    ),
}


@pytest.mark.parametrize("name", LISTS)
async def test_the_messages_of_a_list_are_made_in_many_turns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill, message, ask = LISTS[name]
    async with open_admin_server(tmp_path) as server, server.local() as channel, counting_turns() as turns:
        await server.manager.store.transact(fill)

        class Counted(getattr(pb, message)):  # type: ignore[misc]
            def __post_init__(self) -> None:
                turns.count()
                super().__post_init__()

        with monkeypatch.context() as patched:
            patched.setattr(pb, message, Counted)
            await ask(channel)
    assert turns.total >= MANY
    assert turns.most <= AT_ONCE


async def test_all_bans_are_compared_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager()
    await manager.store.transact(ban_many)
    async with counting_turns() as turns:
        monkeypatch.setattr(bans, "StandingBan", turns.counted(bans.StandingBan))
        values, token = list[str](), ""
        while True:
            page = await manager.bans.page(250, token)
            values += [one.ban.value for one in page.items]
            assert page.total == MANY
            token = page.next_page_token
            if not token:
                break
    assert values == [f"{number:04}" for number in range(MANY)]
    assert turns.most <= AT_ONCE


async def test_a_program_that_follows_learns_in_parts_which_machines_are_gone() -> None:
    async with open_crowd(MANY) as crowd:
        machines = MachineAdministration(MemoryStore(), crowd.directory, crowd.machines, crowd.device, EventHub(), Clock())
        follower = Follower(machines, Hostnames(crowd.directory))
        assert sum([len(part.machines) async for part in follower.changes()]) == MANY
        links = list(crowd.directory)
        for link in links:
            crowd.directory.remove(link)
        gone = [part.gone async for part in follower.changes()]
        assert max(map(len, gone)) <= AT_ONCE
        assert {one for part in gone for one in part} == {link.machine.id for link in links}
        assert [part.gone async for part in follower.changes()] == [[]]


# --- events, reports and limits


async def test_events_that_wait_are_noted_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query writes what waits first, and so does the stop."""
    manager = Manager()
    for ask in (History.entries, History.aclose):
        history = History(manager.store, manager.machines.named, HistoryOptions(), manager.hub.subscribe(QUEUE_LIMIT))
        for _ in range(4 * MANY):
            manager.hub.publish(EventsLost(count=1))
        async with counting_turns() as turns:
            monkeypatch.setattr(history, "note", turns.counted(history.note))
            await ask(history)
        assert turns.total == 4 * MANY
        assert turns.most <= 500


async def test_limits_of_many_machines_are_compared_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_crowd(MANY) as crowd, counting_turns() as turns:
        keys = [link.machine.public_key for link in crowd.directory]
        ingest = ReportIngest(ReportOptions(), crowd.directory.machine_at)
        for link in crowd.directory:
            ingest.drop(link.machine, ReportDrop.LINE_RATE_LIMITED)

        async def limit_drops() -> dict[Any, tuple[int, int]]:
            return dict.fromkeys(keys, (1, 2))

        limits = LimitWatch(crowd.device, crowd.directory, EventHub(), Clock())
        limits.report_drops = ingest.limit_drops
        with monkeypatch.context() as patched:
            patched.setattr(crowd.device, "limit_drops", limit_drops)
            patched.setattr(crowd.directory, "by_key", turns.counted(crowd.directory.by_key))
            await limits.poll()
        assert turns.total == MANY
        assert turns.most <= AT_ONCE
        (counts,) = {tuple(sorted(drops.items())) for drops in (await limits.totals()).dropped.values()}
        assert counts == (("bandwidth_in", 1), ("bandwidth_out", 2), ("line rate limited", 1))
        assert max(map(len, ingest.limit_drops())) <= AT_ONCE


async def test_departed_machines_are_forgotten_in_many_turns() -> None:
    manager = Manager()
    rows = await joined(manager, MANY)
    async with counting_turns() as turns:
        ingest = ReportIngest(ReportOptions(), turns.counted(lambda address: None))
        for row in rows:
            ingest.drop(row, ReportDrop.LINE_RATE_LIMITED)
        await ingest.forget_departed()
        assert turns.total == MANY
        assert turns.most <= AT_ONCE
        assert not any(ingest.limit_drops())
        assert not any(ingest.drops_of(row.id) for row in rows)
