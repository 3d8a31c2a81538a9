"""Postgres that refuses, waits, forgets or ends: each fault is one line, nothing is half done, and it passes."""

import os
import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import psycopg
import pytest

from siderolink.common.errors import StoreError, StoreFullError, StoreUnavailableError
from siderolink.server.store import Store, Transaction
from siderolink.server.store.sql.postgres import PostgresStore
from tests.support.postgres import STATE_KEY, Cluster, cluster
from tests.support.waiting import until
from tests.unit.server.test_postgres import database, url
from tests.unit.server.test_store import machine, work_of

__all__ = ["database", "url"]

T = TypeVar("T")

pytestmark = pytest.mark.anyio


def end_sessions(database: str) -> None:
    """As an administrator does, or a restart of Postgres; returns once they have ended."""
    mine = f"datname = '{database}' AND pid <> pg_backend_pid()"
    cluster().execute(f"SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE {mine}")


def use(database: str, setting: str) -> None:
    """Change a setting for all sessions of the database."""
    cluster().execute(f"ALTER DATABASE {database} {setting}")
    end_sessions(database)


@contextmanager
def held(database: str, statement: str) -> Iterator[None]:
    """Another session has run this statement in a transaction."""
    with psycopg.connect(cluster().url(database)) as other:
        other.execute(statement)
        yield
        other.rollback()


async def until_works(work: Callable[[], Awaitable[T]]) -> T:
    """What the work returns; sessions that were ended take a few tries."""
    with anyio.fail_after(60):
        while True:
            try:
                return await work()
            except StoreUnavailableError:
                await anyio.sleep(0.05)


async def ids(store: Store) -> list[str]:
    async def read() -> list[str]:
        return sorted([row.id async for row in store.machines()])

    return await until_works(read)


async def insert(store: Store, number: int) -> None:
    await until_works(lambda: store.transact(work_of("insert", machine(number, number, overlay=number))))


async def refusal(store: Store, told: str) -> str:
    """Why no row can be inserted, once the reason contains `told`; sessions that were ended are noticed first."""
    with anyio.fail_after(60):
        while True:
            with pytest.raises(StoreUnavailableError) as caught:
                await store.transact(work_of("insert", machine(99, 99, overlay=99)))
            if told in (text := str(caught.value)):
                return text
            await anyio.sleep(0.05)


# --- it refuses


async def test_a_database_that_takes_no_changes_says_so_and_is_read(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
        use(database, "SET default_transaction_read_only = on")
        text = await refusal(store, "takes no changes")
        assert re.fullmatch("the database takes no changes: .* read-only transaction", text)
        assert await ids(store) == ["1"]
        use(database, "RESET default_transaction_read_only")
        await insert(store, 2)
        assert await ids(store) == ["1", "2"]
    use(database, "SET default_transaction_read_only = on")
    with pytest.raises(StoreUnavailableError, match="takes no changes"):
        async with PostgresStore.open(url, key=STATE_KEY):
            pass


async def test_a_database_without_free_connections_is_told_and_waited_for() -> None:
    full = Cluster(max_connections="12", superuser_reserved_connections="0", max_wal_senders="0")
    try:
        with ExitStack() as others:
            with pytest.raises(psycopg.OperationalError, match="too many clients"):
                while True:
                    others.enter_context(psycopg.connect(full.url("postgres")))
            with pytest.raises(StoreUnavailableError, match="too many clients already"):
                async with PostgresStore.open(full.url("postgres"), key=STATE_KEY):
                    pass
        async with PostgresStore.open(full.url("postgres"), key=STATE_KEY) as store:
            await insert(store, 1)
            mine = "application_name = 'siderolink'"
            full.execute(f"SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE {mine}")
            with ExitStack() as others:
                with pytest.raises(psycopg.OperationalError):
                    while True:
                        others.enter_context(psycopg.connect(full.url("postgres")))
                with pytest.raises(StoreUnavailableError):
                    await store.transact(work_of("insert", machine(2, 2, overlay=2)))
            await insert(store, 2)
            assert await ids(store) == ["1", "2"]
    finally:
        full.close()


async def test_a_password_that_is_changed_is_told_until_it_is_changed_back(database: str) -> None:
    upstream, rules = cluster(), cluster().data / "pg_hba.conf"
    before = rules.read_text()
    rules.write_text(f"host all keeper 127.0.0.1/32 scram-sha-256\n{before}")
    upstream.execute("CREATE ROLE keeper LOGIN SUPERUSER PASSWORD 'first'")
    upstream.execute("SELECT pg_reload_conf()")
    address = f"postgresql://keeper@127.0.0.1:{upstream.port}/{database}"

    def needs_password() -> bool:
        try:
            psycopg.connect(address, password="wrong").close()
        except psycopg.OperationalError:
            return True
        return False

    try:
        until(needs_password)
        async with PostgresStore.open(address, password="first", key=STATE_KEY) as store:
            await store.transact(work_of("insert", machine(1, 1)))
            upstream.execute("ALTER ROLE keeper PASSWORD 'second'")
            await store.transact(work_of("insert", machine(2, 2, overlay=2)))  # sessions go on
            end_sessions(database)
            text = await refusal(store, "password authentication failed")
            assert "first" not in text
            assert "\n" not in text
            upstream.execute("ALTER ROLE keeper PASSWORD 'first'")
            await insert(store, 3)
            assert await ids(store) == ["1", "2", "3"]
    finally:
        rules.write_text(before)
        upstream.execute("SELECT pg_reload_conf()")
        end_sessions(database)
        upstream.execute("DROP OWNED BY keeper")
        upstream.execute(f"ALTER DATABASE {database} OWNER TO siderolink")
        upstream.execute("REASSIGN OWNED BY keeper TO siderolink", database)
        upstream.execute("DROP OWNED BY keeper", database)
        upstream.execute("DROP ROLE keeper")


@pytest.fixture
def on_a_small_disk() -> Iterator[str]:
    """A database on a disk of 40 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system")
    upstream = cluster()
    place = Path("/tmp", f"siderolink-small-{os.getpid()}")  # tmp_path is closed to Postgres's user
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "small", str(place)], check=True)
    try:
        shutil.chown(place, upstream.data.owner())
        upstream.execute(f"CREATE TABLESPACE small LOCATION '{place}'")
        upstream.execute("CREATE DATABASE onsmall TABLESPACE small")
        yield "onsmall"
    finally:
        upstream.execute("DROP DATABASE IF EXISTS onsmall WITH (FORCE)")
        upstream.execute("DROP TABLESPACE IF EXISTS small")
        subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


async def test_a_full_disk_is_told_and_nothing_is_lost(on_a_small_disk: str) -> None:
    upstream = cluster()
    async with PostgresStore.open(upstream.url(on_a_small_disk), key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
        upstream.execute("CREATE TABLE filler (text text)", on_a_small_disk)
        for size in (1000, 10, 1):  # to the last page
            with pytest.raises(psycopg.errors.DiskFull):
                while True:
                    rows = f"SELECT repeat('x', 1000) FROM generate_series(1, {size})"
                    upstream.execute(f"INSERT INTO filler {rows}", on_a_small_disk)
        stored = ["1"]
        with pytest.raises(StoreFullError, match="^the state cannot grow: the database's disk is full$"):
            for number in range(2, 2000):  # into the pages that it has
                await store.transact(work_of("insert", machine(number, number, overlay=number)))
                stored.append(str(number))
        assert await ids(store) == sorted(stored)
        upstream.execute("DROP TABLE filler", on_a_small_disk)
        upstream.execute("CHECKPOINT")
        await insert(store, 5000)
        assert await ids(store) == sorted([*stored, "5000"])


# --- it waits, and ends what waits


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("lock_timeout = '50ms'", "canceling statement due to lock timeout"),
        ("statement_timeout = '50ms'", "canceling statement due to statement timeout"),
        ("", "does not answer in time"),
    ],
)
async def test_a_statement_that_waits_is_given_up_and_runs_later(url: str, database: str, setting: str, told: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
        if setting:
            use(database, f"SET {setting}")
        with held(database, "LOCK TABLE machines"):
            assert "\n" not in await refusal(store, told)
        await insert(store, 3)
        assert "3" in await ids(store)


async def disturbed(url: str, disturb: Callable[[str], None]) -> list[str]:
    """The rows after a work whose transaction was disturbed while it had its locks."""
    count = 0

    async def work(transaction: Transaction) -> None:
        nonlocal count
        count += 1
        found = await transaction.machine("1")
        assert found is not None
        if count == 1:  # another server changes what was read: the next attempt takes its locks first
            await anyio.to_thread.run_sync(lambda: disturb("UPDATE machines SET revision = revision + 1"))
        if count == 2:
            await anyio.to_thread.run_sync(lambda: disturb(""))
        await transaction.update(found)
        await transaction.insert(machine(2, 2, overlay=2))

    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
        with pytest.raises(StoreUnavailableError) as caught:  # its commit may have succeeded, so the caller decides
            await store.transact(work)
        assert "\n" not in str(caught.value)
        assert count == 2
        assert await ids(store) == ["1"]
        await until_works(lambda: store.transact(work))
        return await ids(store)


async def test_a_session_that_is_ended_in_a_transaction_is_replaced(url: str, database: str) -> None:
    def disturb(statement: str) -> None:
        if statement:
            cluster().execute(statement, database)
        else:
            end_sessions(database)

    assert await disturbed(url, disturb) == ["1", "2"]


async def test_a_session_that_was_idle_in_a_transaction_for_too_long_is_replaced(url: str, database: str) -> None:
    setting = "idle_in_transaction_session_timeout"
    idle = f"SELECT pid FROM pg_stat_activity WHERE datname = '{database}' AND state LIKE 'idle in transaction%'"

    def configure(change: str) -> None:
        cluster().execute(f"ALTER SYSTEM {change}")
        cluster().execute("SELECT pg_reload_conf()")

    def disturb(statement: str) -> None:
        if statement:
            cluster().execute(statement, database)
            configure(f"SET {setting} = '3s'")
            # a new session has the new value only after all present ones were told of it
            until(lambda: cluster().execute(f"SHOW {setting}") == [("3s",)])
        else:
            until(lambda: not cluster().execute(idle))

    try:
        assert await disturbed(url, disturb) == ["1", "2"]
    finally:
        configure(f"RESET {setting}")


# --- a schema that is not whole


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("DELETE FROM alembic_version", "alembic_version, which records its schema, has 0 rows instead of one"),
        ("INSERT INTO alembic_version VALUES ('3')", "alembic_version, which records its schema, has 2 rows instead of one"),
        ("DROP TABLE audit", "its table audit lacks the column action, or is missing"),
        ("ALTER TABLE machines DROP COLUMN seen_at", "its table machines lacks the column seen_at, or is missing"),
    ],
)
async def test_a_schema_that_is_not_whole_is_told_and_left(url: str, database: str, statement: str, told: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
    cluster().execute(statement, database)
    with pytest.raises(StoreError, match=f"is damaged; it was not changed: .*{told}; restore a dump, or give an empty"):
        async with PostgresStore.open(url, key=STATE_KEY):
            pass
    assert cluster().execute("SELECT id FROM machines", database) == [("1",)]


async def test_a_server_that_is_killed_while_it_migrates_changes_nothing(url: str, database: str) -> None:
    """A migration is one transaction, which the end of its session rolls back."""
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
    cluster().execute("ALTER TABLE machines DROP COLUMN rate_rx, DROP COLUMN rate_tx", database)
    cluster().execute("ALTER TABLE principals DROP COLUMN grants", database)
    cluster().execute("ALTER TABLE join_tokens DROP COLUMN max_machines", database)
    cluster().execute("UPDATE alembic_version SET version_num = '8'", database)
    columns = "SELECT count(*) FROM information_schema.columns WHERE table_schema = 'public'"
    before = cluster().execute(columns, database)
    with held(database, "LOCK TABLE principals IN ACCESS SHARE MODE"), anyio.move_on_after(20):  # it waits in the middle
        async with anyio.create_task_group() as tasks:

            async def kill() -> None:
                waiting = f"datname = '{database}' AND wait_event_type = 'Lock'"
                while not cluster().execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {waiting}"):
                    await anyio.sleep(0.02)

            tasks.start_soon(kill)
            with pytest.raises(StoreUnavailableError, match="terminating connection|closed the connection"):
                async with PostgresStore.open(url, key=STATE_KEY):
                    pass
            tasks.cancel_scope.cancel()
    assert cluster().execute(columns, database) == before
