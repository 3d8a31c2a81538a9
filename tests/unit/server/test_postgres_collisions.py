"""Postgres aborts transactions that collide with others: they run again. A COMMIT that is cut off is told, never half done."""

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import psycopg
import pytest
from grpclib import GRPCError, Status

from siderolink.common.errors import StoreUnavailableError
from siderolink.common.pb.siderolink.admin.v1 import CreateTokenRequest, TokenServiceStub
from siderolink.server.store import Store, Transaction
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.admin_server import open_admin_server
from tests.support.database_relay import DatabaseRelay, database_relay
from tests.support.manager import FakeMachine, Manager
from tests.support.postgres import STATE_KEY, cluster
from tests.support.waiting import until
from tests.unit.server.test_postgres import database, url
from tests.unit.server.test_postgres_faults import ids, until_works
from tests.unit.server.test_store import machine, work_of

__all__ = ["database", "url"]

pytestmark = pytest.mark.anyio
MAY = "the change may have been stored"
_GATE = 42
"""An advisory lock on which commits wait."""


def on_change(database: str, body: str, *, at_commit: bool, table: str = "machines") -> None:
    """Run PL/pgSQL at each change of a row, or at the commit of it."""
    kind, when = ("CONSTRAINT TRIGGER", "DEFERRABLE INITIALLY DEFERRED") if at_commit else ("TRIGGER", "")
    cluster().execute(
        f"CREATE FUNCTION disturb() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} RETURN NULL; END$$;"
        f"CREATE {kind} disturb AFTER INSERT OR UPDATE ON {table} {when} FOR EACH ROW EXECUTE FUNCTION disturb()",
        database,
    )


def is_waiting(database: str) -> bool:
    """Whether a session waits for a lock."""
    found = f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database}' AND wait_event_type = 'Lock'"
    return bool(cluster().execute(found))


# --- collisions


@pytest.mark.parametrize("at_commit", [False, True], ids=["statement", "commit"])
@pytest.mark.parametrize("state", ["40001", "40P01"])
async def test_an_aborted_transaction_runs_again(url: str, database: str, state: str, at_commit: bool) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        cluster().execute("CREATE SEQUENCE attempts", database)  # numbers are drawn for good, also in what is rolled back
        fail = f"RAISE EXCEPTION 'provoked' USING ERRCODE = '{state}';"
        on_change(database, f"IF nextval('attempts') <= 3 THEN {fail} END IF;", at_commit=at_commit)
        await store.transact(work_of("insert", machine(1, 1)))
        assert await ids(store) == ["1"]
        assert cluster().execute("SELECT last_value FROM attempts", database) == [(4,)]


async def test_a_transaction_that_is_always_aborted_is_told_and_changes_nothing(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        on_change(database, "RAISE EXCEPTION 'provoked' USING ERRCODE = '40001';", at_commit=True)
        with pytest.raises(StoreUnavailableError, match="too busy: other transactions keep changing the same rows"):
            await store.transact(work_of("insert", machine(1, 1)))
        assert await ids(store) == []


async def test_the_victim_of_a_deadlock_runs_again(url: str, database: str) -> None:
    """Another session has the row that ours waits for, and then wants a lock of ours."""
    held = (
        "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database "
        f"WHERE locktype = 'advisory' AND granted AND datname = '{database}'"
    )
    victims = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    runs = 0

    async def work(transaction: Transaction) -> None:
        nonlocal runs
        runs += 1
        found = await transaction.machine("1")
        assert found is not None
        await transaction.update(replace(found, created_at=found.created_at + 1))

    def collide() -> None:
        with psycopg.connect(url) as other:
            other.execute("SET deadlock_timeout = '60s'")  # the victim is who looks first
            other.execute("UPDATE machines SET created_at = 10 WHERE id = '1'")
            locked.set()
            until(lambda: is_waiting(database))
            (number,), *_ = cluster().execute(held, database)
            other.execute("SELECT pg_advisory_xact_lock(%s)", (number,))
            other.commit()

    locked = threading.Event()
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, collide)
            await anyio.to_thread.run_sync(locked.wait)
            await store.transact(work)
        assert runs > 1
        assert [row.created_at async for row in store.machines()] == [11.0]
        with anyio.fail_after(60):
            while cluster().execute(victims, database) == [(0,)]:
                await anyio.sleep(0.05)


# --- a COMMIT that is cut off


class Gate:
    """Commits of changed rows wait in Postgres until it is opened."""

    def __init__(self, database: str, table: str) -> None:
        self._database = database
        self._holder = psycopg.connect(cluster().url(database), autocommit=True)
        self._holder.execute("SELECT pg_advisory_lock(%s)", (_GATE,))
        on_change(database, f"PERFORM pg_advisory_xact_lock({_GATE});", at_commit=True, table=table)

    def open(self) -> None:
        self._holder.close()

    async def cut_commit(self, call: Callable[[], Awaitable[object]], cut: Callable[[], object]) -> Exception:
        """The error of a call whose COMMIT is cut off."""
        caught: list[Exception] = []

        async def run() -> None:
            with pytest.raises(Exception) as found:  # noqa: PT011 # the caller judges it
                await call()
            caught.append(found.value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await anyio.to_thread.run_sync(until, lambda: is_waiting(self._database))
            await anyio.to_thread.run_sync(cut)
        return caught[0]


@asynccontextmanager
async def relayed(folder: Path, database: str) -> AsyncIterator[tuple[PostgresStore, DatabaseRelay]]:
    upstream = cluster()
    with database_relay(folder / "relay", upstream.folder / f".s.PGSQL.{upstream.port}") as relay:
        async with PostgresStore.open(relay.url(database), key=STATE_KEY) as store:
            yield store, relay


async def rows(store: Store) -> int:
    return len(await ids(store))


async def test_a_session_that_is_ended_within_its_commit_leaves_nothing(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        gate = Gate(database, "machines")
        insert = work_of("insert", machine(1, 1))
        mine = f"datname = '{database}' AND wait_event_type = 'Lock'"
        end = f"SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE {mine}"
        error = await gate.cut_commit(lambda: store.transact(insert), lambda: cluster().execute(end))
        assert isinstance(error, StoreUnavailableError)
        assert MAY in str(error)
        gate.open()
        assert await ids(store) == []
        await until_works(lambda: store.transact(insert))
        assert await ids(store) == ["1"]


async def test_a_refused_commit_is_not_said_to_be_stored(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        on_change(database, "RAISE EXCEPTION 'provoked' USING ERRCODE = '55P03';", at_commit=True)
        with pytest.raises(StoreUnavailableError) as caught:
            await store.transact(work_of("insert", machine(1, 1)))
        assert MAY not in str(caught.value)
        assert await ids(store) == []


async def test_a_join_whose_commit_is_cut_off_is_refused_and_finds_its_row(tmp_path: Path, database: str) -> None:
    async with relayed(tmp_path, database) as (store, relay):
        manager, joining = Manager(store=store), FakeMachine()
        gate = Gate(database, "machines")
        error = await gate.cut_commit(lambda: manager.join(joining), relay.cut)
        assert isinstance(error, GRPCError)
        assert error.status is Status.UNAVAILABLE
        gate.open()
        relay.open()
        with anyio.fail_after(60):
            while await rows(store) == 0:  # the commit goes on without its session's client
                await anyio.sleep(0.05)
        (stored,) = [row async for row in store.machines()]
        answer = await until_joined(manager, joining)
        assert answer.partition("/")[0] == str(stored.overlay_address)
        assert await rows(store) == 1


async def until_joined(manager: Manager, joining: FakeMachine) -> str:
    """The address in the answer."""
    with anyio.fail_after(60):
        while True:
            with suppress(GRPCError):
                return (await manager.join(joining)).node_address_prefix
            await anyio.sleep(0.05)


async def test_an_admin_call_whose_commit_is_cut_off_says_that_it_may_be_stored(tmp_path: Path, database: str) -> None:
    async with relayed(tmp_path, database) as (store, relay), open_admin_server(tmp_path, store) as server:
        async with server.local() as channel:
            tokens = TokenServiceStub(channel)
            gate = Gate(database, "join_tokens")
            request = CreateTokenRequest(name="rack-7")
            error = await gate.cut_commit(lambda: tokens.create_token(request), relay.cut)
            assert isinstance(error, GRPCError)
            assert error.status is Status.UNAVAILABLE
            assert MAY in (error.message or "")
            gate.open()
            relay.open()
            with anyio.fail_after(60):
                while True:
                    with pytest.raises(GRPCError) as caught:
                        await tokens.create_token(request)
                    if caught.value.status is Status.ALREADY_EXISTS:
                        return
                    assert caught.value.status is Status.UNAVAILABLE
                    await anyio.sleep(0.05)
