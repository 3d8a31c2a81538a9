"""The store on Postgres: its feed, its schema, several servers on one database, an outage, and poolers."""

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import psycopg
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from siderolink.cli.state_migration import run_migrate
from siderolink.common.errors import ConfigurationError, StoreError, StoreUnavailableError
from siderolink.common.keys import PrivateKey
from siderolink.server.store import (
    Ban,
    ChangesLost,
    HistoryEntry,
    HistoryKind,
    HistoryQuery,
    LastSeen,
    Machine,
    MachineChanged,
    ServerRecord,
    Store,
    Transaction,
    UniqueViolationError,
)
from siderolink.server.store.sealing import SERVER_KEY, write_key
from siderolink.server.store.sql import SqlStore, schema, tables
from siderolink.server.store.sql.postgres import PostgresStore, feed
from siderolink.server.store.sql.postgres.database import database_url, describe
from tests.support.postgres import STATE_KEY, Cluster, cluster, free_port, pgbouncer
from tests.unit.server.test_store import claim, machine, work_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def database() -> Iterator[str]:
    with cluster().database() as name:
        yield name


@pytest.fixture
def url(database: str) -> str:
    return cluster().url(database)


@pytest.fixture
def own_cluster() -> Iterator[Cluster]:
    """A cluster that the test may stop."""
    found = Cluster(is_durable=True)
    try:
        yield found
    finally:
        found.close()


# --- the address


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ("postgresql://db.example.com/x", "verify-full"),
        ("postgresql://u@192.0.2.1:5433/x", "verify-full"),
        ("postgresql://u@/x?host=/run/postgresql&host=db.example.com", "verify-full"),
        ("postgresql://db.example.com/x?sslmode=require", "require"),
        ("postgresql://127.0.0.1/x", None),
        ("postgresql://u@/x?host=127.0.0.1:5433&host=/run/x:5434&host=localhost:1", None),
        ("postgresql://u@/x?host=127.0.0.1:5433&host=192.0.2.1:5434", "verify-full"),
        ("postgresql://u@/x?host=/run/postgresql", None),
    ],
)
def test_a_remote_database_must_prove_its_name(given: str, mode: str | None) -> None:
    found = database_url(given, "s3cret")
    assert found.query.get("sslmode") == mode
    assert "s3cret" not in repr(found) + str(found) + describe(found)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("mysql://h/x", "not mysql://"),
        ("postgresql://h", "names no database"),
        ("postgresql://u:s3cret@h/x?options=-csearch_path%3Dy", "unknown parameters: options"),
        ("postgresql://u:s3cret@h:port/x", "is not a URL"),
        ("no url", "is not a URL"),
    ],
)
def test_another_database_address_is_refused_without_printing_its_password(given: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        database_url(given)
    assert "s3cret" not in str(caught.value)


async def test_a_database_that_does_not_answer_is_one_clear_line() -> None:
    with pytest.raises(StoreUnavailableError, match="does not answer") as caught:
        async with PostgresStore.open(f"postgresql://u@127.0.0.1:{free_port()}/x", password="s3cret", key=STATE_KEY):
            pass
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


# --- the schema


async def test_the_first_of_several_servers_makes_the_schema(url: str) -> None:
    stores: list[PostgresStore] = []

    async def open_one() -> None:
        async with PostgresStore.open(url, key=STATE_KEY) as store:
            stores.append(store)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(open_one)
    assert len(stores) == 4


async def test_the_schema_is_what_the_program_knows(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY):
        pass
    for table in tables.metadata.sorted_tables:
        found = cluster().execute(
            f"SELECT column_name, is_nullable FROM information_schema.columns WHERE table_name = '{table.name}'", database
        )
        assert dict(found) == {column.name: "YES" if column.nullable else "NO" for column in table.columns}  # type: ignore[arg-type]


async def test_a_schema_of_the_next_release_is_used_and_a_newer_one_refused(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1, key=1, overlay=1)))
    # a migration only adds: what this release does not know has a default, and stays as it is
    cluster().execute("ALTER TABLE machines ADD COLUMN later text NOT NULL DEFAULT 'none'", database)
    cluster().execute("CREATE TABLE later (machine_id text PRIMARY KEY)", database)
    cluster().execute("UPDATE machines SET later = 'kept'", database)
    cluster().execute(f"UPDATE alembic_version SET version_num = '{int(tables.HEAD) + 3}'", database)
    cluster().execute(f"UPDATE feed SET usable_since = {tables.HEAD}", database)
    async with PostgresStore.open(url, key=STATE_KEY) as store, store.changes() as changes:
        await store.transact(work_of("insert", machine(2, 2, key=2, overlay=2)))
        await store.transact(work_of("update", machine(1, 1, key=3, overlay=1)))
        assert {row.id async for row in store.machines()} == {"1", "2"}
        cluster().execute("INSERT INTO changes (kind, id, body) VALUES ('later', '1', '{}')", database)
        cluster().execute("UPDATE changes SET body = (body::jsonb || '{\"later\": 1}')::text WHERE kind = 'machine'", database)
        await store.transact(work_of("insert", machine(3, 3, key=4, overlay=3)))
        assert [change.machine.id for change in [await anext(changes) for _ in range(3)] if isinstance(change, MachineChanged)]
    asked = "SELECT id, later FROM machines WHERE id < '3'"
    assert dict(cluster().execute(asked, database)) == {"1": "kept", "2": "none"}  # type: ignore[arg-type]
    cluster().execute(f"UPDATE feed SET usable_since = {int(tables.HEAD) + 1}", database)
    with pytest.raises(StoreError, match="was written by a newer siderolink"):
        async with PostgresStore.open(url, key=STATE_KEY):
            pass


async def test_a_migration_only_adds(url: str, database: str) -> None:
    """What an older program that may use today's schema reads and writes is there, and it may leave out the rest."""

    def look() -> dict[tuple[object, object], tuple[object, ...]]:
        asked = (
            "SELECT table_name, column_name, data_type, is_nullable, coalesce(column_default, identity_generation)"
            " FROM information_schema.columns WHERE table_schema = 'public'"
        )
        return {(table, name): rest for table, name, *rest in cluster().execute(asked, database)}  # type: ignore[misc]

    engine = create_engine(database_url(url))
    with engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(schema.__file__).with_name("migrations")))
        config.attributes["connection"] = connection
        command.upgrade(config, str(schema.USABLE_SINCE))
    engine.dispose()
    before = look()
    async with PostgresStore.open(url, key=STATE_KEY):
        pass
    after = look()
    assert {name: after.get(name) for name in before} == before
    added = {(table, name): rest for (table, name), rest in after.items() if (table, name) not in before}
    known = {table for table, _ in before}
    required = {name for name, (_, nullable, default) in added.items() if name[0] in known and nullable == "NO" and not default}
    assert required == set()
    assert cluster().execute("SELECT usable_since FROM feed", database) == [(schema.USABLE_SINCE,)]


async def test_a_database_of_another_program_is_not_touched(url: str, database: str) -> None:
    cluster().execute("CREATE TABLE cats (name text)", database)
    with pytest.raises(StoreError, match="contains other data"):
        async with PostgresStore.open(url, key=STATE_KEY):
            pass
    assert cluster().execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'", database) == [
        ("cats",)
    ]


# --- several servers


async def test_races_of_servers_are_serialized(url: str) -> None:
    """Two servers count up one row, and ban and join one machine: no update is lost, nobody is let in."""
    ban = Ban(value="uuid-7")

    async def count_up(transaction: Transaction) -> None:
        row = await transaction.machine("1")
        assert row is not None
        await anyio.sleep(0.001)
        await transaction.update(replace(row, created_at=row.created_at + 1))

    async def join(transaction: Transaction) -> None:
        if not await transaction.is_banned(ban):
            await anyio.sleep(0.01)
            await transaction.insert(machine(7, 7, overlay=7))

    async def forbid(transaction: Transaction) -> None:
        await transaction.set_banned(ban, True)
        found = await transaction.machine_by_uuid("uuid-7")
        await anyio.sleep(0.01)
        if found is not None:
            await transaction.delete(found.id)

    async with PostgresStore.open(url, key=STATE_KEY) as one, PostgresStore.open(url, key=STATE_KEY) as two:
        await one.transact(work_of("insert", machine(1, 1, overlay=1)))
        async with anyio.create_task_group() as tasks:
            for store in (one, two) * 10:
                tasks.start_soon(store.transact, count_up)
        for _ in range(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(one.transact, join)
                tasks.start_soon(two.transact, forbid)
            assert {row.id: row.created_at async for row in two.machines()} == {"1": 20.0}
            await one.transact(lambda transaction: transaction.set_banned(ban, False))


async def test_a_server_hears_what_another_changes(url: str) -> None:
    async with (
        PostgresStore.open(url, key=STATE_KEY) as one,
        PostgresStore.open(url, key=STATE_KEY) as two,
        two.changes() as changes,
    ):
        await one.transact(work_of("insert", machine(1, 1, key=1)))
        assert await anext(changes) == MachineChanged(machine=machine(1, 1, key=1))


async def test_an_update_keeps_a_note_that_came_meanwhile(url: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store, PostgresStore.open(url, key=STATE_KEY) as other:
        await store.transact(work_of("insert", machine(1, 1)))
        runs = 0

        async def work(transaction: Transaction) -> Machine:
            nonlocal runs
            runs += 1
            row = await transaction.machine("1")
            assert row is not None
            if runs == 1:
                await other.transact(lambda other: other.note({"1": LastSeen(endpoint="192.0.2.7:1", seen_at=5.0)}, 5.0))
            return await transaction.update(replace(row, talos_version="v1.9"))

        assert (await store.transact(work)).seen_at == 5.0
        assert runs == 2


# --- the feed


async def test_a_slower_writer_with_lower_numbers_is_not_skipped(url: str, database: str) -> None:
    """Two writers draw their numbers in one order and commit in the other."""
    insert = "INSERT INTO changes (kind, id, body) VALUES ('ban', %s, %s)"

    def body(name: str) -> str:
        return f'{{"kind": "uuid", "value": "{name}"}}'

    async with PostgresStore.open(url, key=STATE_KEY) as store, store.changes() as changes:
        slow = await psycopg.AsyncConnection.connect(url)
        quick = await psycopg.AsyncConnection.connect(url)
        async with slow, quick:
            await slow.execute(insert, ("slow", body("slow")))
            await quick.execute(insert, ("quick", body("quick")))
            await quick.commit()
            # another reader passes by while the slow one still runs
            async with store.changes():
                pass
            await slow.commit()
        found = [await anext(changes) for _ in range(2)]
    assert [change.ban.value for change in found if not isinstance(change, ChangesLost)] == ["slow", "quick"]  # type: ignore[union-attr]


async def test_a_change_made_by_hand_does_not_stop_the_feed(url: str) -> None:
    insert = "INSERT INTO changes (kind, id, body) VALUES (%s, 'x', %s)"
    async with PostgresStore.open(url, key=STATE_KEY) as store, store.changes() as changes:
        writer = await psycopg.AsyncConnection.connect(url, autocommit=True)
        async with writer:
            for kind, body in (("machine", "{"), ("ban", '{"kind": "none", "value": 5}'), ("owner", "[]"), ("server", "null")):
                await writer.execute(insert, (kind, body))
                assert await anext(changes) == ChangesLost()
        await store.transact(work_of("insert", machine(1, 1)))
        assert isinstance(await anext(changes), MachineChanged)


async def test_a_reader_behind_what_was_pruned_reads_all(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store, PostgresStore.open(url, key=STATE_KEY) as other:
        async with store.changes() as changes:
            holder = await psycopg.AsyncConnection.connect(url)
            async with holder:
                await holder.execute("SELECT pg_current_xact_id()")  # the feed cannot pass this
                await other.transact(work_of("insert", machine(1, 1)))
                await other.prune_changes(0)
                assert cluster().execute("SELECT count(*) FROM changes", database) == [(1,)]  # nobody can have read it
            assert isinstance(await anext(changes), MachineChanged)
        await other.transact(work_of("insert", machine(2, 2, overlay=2)))
        async with other.changes():
            await other.prune_changes(0)
        assert cluster().execute("SELECT count(*) FROM changes", database) == [(0,)]
        async with store.changes() as changes:
            cluster().execute("UPDATE feed SET pruned = pg_current_xact_id()", database)
            assert await anext(changes) == ChangesLost()


async def test_a_reader_that_is_far_behind_reads_part_by_part(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST_AT_ONCE", 3)

    async def many(transaction: Transaction) -> None:
        for number in range(20, 30):
            await transaction.insert(machine(number, number, overlay=number))

    async with PostgresStore.open(url, key=STATE_KEY) as store, PostgresStore.open(url, key=STATE_KEY) as other:
        async with store.changes() as changes, await psycopg.AsyncConnection.connect(url) as holder:
            await holder.execute("SELECT pg_current_xact_id()")  # the feed cannot pass this
            for number in range(10):
                await other.transact(work_of("insert", machine(number, number, overlay=number)))
            await holder.rollback()
            found = [await anext(changes) for _ in range(10)]
            assert [change.machine.id for change in found if isinstance(change, MachineChanged)] == [*map(str, range(10))]
            await other.transact(many)
            assert await anext(changes) == ChangesLost()
            await other.transact(work_of("insert", machine(40, 40, overlay=40)))
            assert isinstance(await anext(changes), MachineChanged)


async def test_changes_of_another_clusters_transactions_are_forgotten(url: str, database: str) -> None:
    """After a restore of a dump, the numbers of transactions that are still to come stand in the table."""
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1)))
    cluster().execute("UPDATE changes SET xid = '99999999'", database)
    cluster().execute("UPDATE feed SET pruned = '99999999'", database)
    async with PostgresStore.open(url, key=STATE_KEY) as store, store.changes() as changes:
        assert cluster().execute("SELECT count(*) FROM changes", database) == [(0,)]
        await store.transact(work_of("insert", machine(2, 2, overlay=2)))
        assert isinstance(await anext(changes), MachineChanged)


# --- an outage


async def test_an_unreachable_database_is_reported_and_used_again(own_cluster: Cluster) -> None:
    own_cluster.execute("CREATE DATABASE state")
    async with PostgresStore.open(own_cluster.url("state"), key=STATE_KEY) as store, store.changes() as changes:
        await store.transact(work_of("insert", machine(1, 1, key=1)))
        assert isinstance(await anext(changes), MachineChanged)
        own_cluster.stop(signal.SIGQUIT)
        with pytest.raises(StoreUnavailableError):
            await store.transact(work_of("insert", machine(2, 2, overlay=2)))
        with pytest.raises(StoreUnavailableError):
            [row async for row in store.machines()]
        await anyio.to_thread.run_sync(own_cluster.start)
        await store.transact(work_of("insert", machine(3, 3, overlay=3)))
        assert {row.id async for row in store.machines()} == {"1", "3"}
        assert await anext(changes) == ChangesLost()  # the last commits may be lost; all rows are read again
        await store.transact(work_of("insert", machine(4, 4, overlay=4)))
        while not isinstance(change := await anext(changes), MachineChanged) or change.machine.id != "4":
            pass


async def test_a_silent_database_times_out_and_is_used_again(own_cluster: Cluster) -> None:
    own_cluster.execute("CREATE DATABASE state")
    async with PostgresStore.open(own_cluster.url("state"), key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1, key=1)))
        own_cluster.signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnavailableError):
                await store.transact(lambda transaction: transaction.machine("1"))
        finally:
            own_cluster.signal(signal.SIGCONT)
        assert await store.transact(lambda transaction: transaction.machine("1")) is not None


# --- moved, and restored


def test_a_state_moves_from_a_file_to_postgres_and_back(tmp_path: Path, url: str) -> None:
    record = ServerRecord(private_key=bytes(PrivateKey.generate()), installation_id="here", timestamp_mark=bytes(range(12)))
    rows = [replace(machine(n, n, key=n % 250, overlay=n, virtual=10_000 + n), seen_at=5.0) for n in range(240)]
    kept = claim(1)
    happened = [HistoryEntry(at=float(n), machine_id="1", node_uuid="", kind=HistoryKind.UP) for n in range(1100)]

    async def fill(transaction: Transaction) -> None:
        for row in rows:
            await transaction.insert(row)
        await transaction.put_claim(kept)
        await transaction.set_banned(Ban(value="uuid-9"), True)
        await transaction.set_server(record)
        await transaction.add_history(happened)

    async def make() -> None:
        async with SqlStore.open(tmp_path / "state") as store:
            await store.transact(fill)

    async def look(opened: AbstractAsyncContextManager[Store]) -> None:
        async with opened as store:
            assert {row.id: row async for row in store.machines()} == {row.id: row for row in rows}
            assert list(await store.all_claims()) == [kept]
            assert list(await store.bans()) == [Ban(value="uuid-9")]
            found = await store.history(HistoryQuery(after_seq=0, limit=5000))
            assert [replace(entry, seq=0) for entry in found] == happened
            found_record = await store.transact(lambda transaction: transaction.server())
            assert found_record is not None
            opened_key = store.sealer.open(found_record.private_key, SERVER_KEY)
            assert replace(found_record, private_key=opened_key) == record

    anyio.run(make)
    key_file = tmp_path / "back.key"  # of the database, and of the file that is made of it
    write_key(key_file, STATE_KEY.read() or b"")
    run_migrate(str(tmp_path / "state"), url, None, key_file)
    anyio.run(look, PostgresStore.open(url, key=STATE_KEY))
    with pytest.raises(StoreError, match="already contains a server"):
        run_migrate(str(tmp_path / "state"), url, None, key_file)
    run_migrate(url, str(tmp_path / "back"), None, key_file)
    anyio.run(look, SqlStore.open(tmp_path / "back"))
    with pytest.raises(ConfigurationError, match="exists"):
        run_migrate(url, str(tmp_path / "back"), None, key_file)


async def test_a_state_in_use_is_not_moved(tmp_path: Path, url: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY):
        with pytest.raises(StoreError, match="a server uses"):
            async with PostgresStore.open(url, alone=True, key=STATE_KEY):
                pass
    async with PostgresStore.open(url, alone=True, key=STATE_KEY):
        pass


async def test_a_dump_is_restored_and_the_feed_goes_on(url: str, database: str) -> None:
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        await store.transact(work_of("insert", machine(1, 1, key=1, overlay=1)))
        dump = cluster().run("pg_dump", "--format=custom", "--file=dump", database)
        await store.transact(work_of("insert", machine(2, 2, key=2, overlay=2)))
    assert dump == b""
    cluster().run("pg_restore", "--clean", "--if-exists", "--single-transaction", f"--dbname={database}", "dump")
    async with PostgresStore.open(url, key=STATE_KEY) as store, store.changes() as changes:
        assert [row.id async for row in store.machines()] == ["1"]
        with pytest.raises(UniqueViolationError):
            await store.transact(work_of("insert", machine(3, 3, overlay=1)))
        await store.transact(work_of("insert", machine(4, 2, key=2, overlay=2)))
        change = await anext(changes)
        assert isinstance(change, MachineChanged)
        assert change.machine.id == "4"


# --- a pooler


@asynccontextmanager
async def opened_in_time(url: str) -> AsyncIterator[PostgresStore]:
    with anyio.fail_after(30):
        while True:
            try:
                async with PostgresStore.open(url, key=STATE_KEY):
                    break
            except StoreUnavailableError:
                await anyio.sleep(0.1)
    async with PostgresStore.open(url, key=STATE_KEY) as store:
        yield store


async def test_behind_a_pooler_by_transaction_the_feed_goes_on(tmp_path: Path, database: str) -> None:
    with pgbouncer(tmp_path, database) as url:
        async with opened_in_time(url) as store, PostgresStore.open(url, key=STATE_KEY) as other, other.changes() as changes:

            async def add(number: int) -> None:
                await store.transact(work_of("insert", machine(number, number, overlay=number)))

            async with anyio.create_task_group() as tasks:
                for number in range(30):
                    tasks.start_soon(add, number)
            found = [await anext(changes) for _ in range(30)]
            async with await psycopg.AsyncConnection.connect(url, autocommit=True, prepare_threshold=None) as connection:
                for _ in range(6):  # each may use another session
                    cursor = await connection.execute("SELECT count(*) FROM pg_prepared_statements")
                    assert await cursor.fetchone() == (0,)
    assert {change.machine.id for change in found if isinstance(change, MachineChanged)} == {
        str(number) for number in range(30)
    }
