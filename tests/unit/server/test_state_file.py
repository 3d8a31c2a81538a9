"""The state file: its owner, refused files that stay unchanged, crash safety, and a full disk."""

import asyncio
import errno
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiosqlite
import anyio
import pytest
from alembic.command import upgrade
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect

from siderolink.cli.state_copy import put
from siderolink.common.errors import StoreError, StoreFullError, StoreUnavailableError
from siderolink.common.private_files import create_private, draft_of
from siderolink.server.store import Ban, Machine, UniqueViolationError
from siderolink.server.store.sql import SqlStore, tables
from siderolink.server.store.sql import file as file_module
from siderolink.server.store.sql.file import APPLICATION_ID, prepare
from tests.unit.server.test_store import machine, work_of

pytestmark = pytest.mark.anyio


async def fill(path: Path, count: int = 1, first: int = 0) -> list[Machine]:
    """Open the file, add rows, and return all there are."""
    async with SqlStore.open(path) as store:
        for number in range(first, first + count):
            await store.transact(work_of("insert", machine(number, number, overlay=number)))
        return [row async for row in store.machines()]


def content(path: Path) -> bytes:
    return path.read_bytes()


def modes(folder: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


async def refusal(path: Path) -> str:
    """The reason why the file is not opened; checks that it is unchanged."""
    before = content(path)
    with pytest.raises(StoreError) as caught:
        async with SqlStore.open(path):
            pass
    assert content(path) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def test_rows_outlive_the_store(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "state"
    rows = await fill(path, 3)
    assert await fill(path, 0) == rows
    assert len(rows) == 3


@pytest.mark.parametrize("name", ["a?b", "c%20d", "e#f", "g:h@i"])
async def test_file_names_are_used_literally(tmp_path: Path, name: str) -> None:
    """It is not interpreted as part of the database driver's URL."""
    assert len(await fill(tmp_path / name)) == 1
    found = modes(tmp_path)
    assert set(found) <= {name, f"{name}-wal", f"{name}-shm"}
    assert found[name] == 0o600


async def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = tmp_path / "new" / "state"
        async with SqlStore.open(path) as store:
            await store.transact(work_of("insert", machine(1, 1)))
            await store.backup(tmp_path / "copy")
            modes = {file.name: file.stat().st_mode & 0o777 for file in (*path.parent.iterdir(), tmp_path / "copy")}
        assert modes.keys() >= {"state", "state-wal", "copy"}
        assert set(modes.values()) == {0o600}
        assert path.parent.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(old)


async def test_a_file_readable_by_others_gets_private_permissions(tmp_path: Path) -> None:
    path = tmp_path / "state"
    await fill(path)
    path.chmod(0o644)
    await fill(path, 0)
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_file_that_is_not_a_state_is_not_touched(tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_text("my notes, not yours")
    assert "is not a siderolink state file" in await refusal(text)
    with closing(sqlite3.connect(other)) as database, database:
        database.execute("CREATE TABLE cats (name)")
    assert "is not a siderolink state file" in await refusal(other)
    link = tmp_path / "link"
    link.symlink_to(text)
    assert "cannot be opened" not in await refusal(link)
    assert "is a symbolic link" in await refusal(link)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="is not a regular file"):
        async with SqlStore.open(tmp_path / "pipe"):
            pass


async def test_a_damaged_file_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "state"
    await fill(path, 300)
    whole = path.read_bytes()
    torn = bytearray(whole)
    torn[len(torn) // 2 : len(torn) // 2 + 4096] = b"\xa5" * 4096
    path.write_bytes(torn)
    assert "is damaged" in await refusal(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in await refusal(path)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("machines.node_uuid", "x'ff00ff'"),
        ("machines.public_key", "'text'"),
        ("machines.created_at", "'text'"),
        ("machines.seen_at", "x'00'"),
        ("machines.revision", "9e999"),
        ("machines.rate_rx", "'text'"),
        ("machines.was_linked", "'text'"),
        ("machines.unique_token_digest", "5"),
        ("bans.reason", "x'ff'"),
        ("bans.created_at", "'text'"),
    ],
)
async def test_a_value_of_another_type_than_its_column_is_damage(tmp_path: Path, column: str, value: str) -> None:
    """SQLite accepts any type in any column."""
    path = tmp_path / "state"
    await fill(path)
    async with SqlStore.open(path) as store:
        await store.transact(lambda transaction: transaction.set_banned(Ban(value="uuid-9"), True))
    table, _, name = column.partition(".")
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(f"UPDATE {table} SET {name} = {value}").rowcount == 1
        database.execute("PRAGMA journal_mode=DELETE")
    assert f"is damaged; it was not changed: a row has no proper value in {column}" in await refusal(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("DELETE FROM alembic_version", "the table alembic_version, which records its schema, has 0 rows instead of one"),
        ("INSERT INTO alembic_version VALUES ('3')", "the table alembic_version, which records its schema, has 2 rows"),
        ("DROP TABLE alembic_version", "the table alembic_version, which records its schema, has 0 rows instead of one"),
        ("DROP TABLE machines", "it lacks the table machines"),
        ("ALTER TABLE machines RENAME TO old; CREATE VIEW machines AS SELECT * FROM old", "it lacks the table machines"),
        ("ALTER TABLE machines DROP COLUMN is_installed", "no such column: machines.is_installed"),
        ("UPDATE alembic_version SET version_num = '5'", "duplicate column"),
        ("UPDATE alembic_version SET version_num = '5'; DROP TABLE machines", "no such table: machines"),
    ],
)
async def test_another_schema_than_a_file_claims_is_damage(tmp_path: Path, change: str, told: str) -> None:
    path = tmp_path / "state"
    await fill(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(change)
    text = await refusal(path)
    assert "is damaged; it was not changed" in text
    assert told in text
    assert text.endswith("restore a backup, or move the file away to start over")


async def test_a_file_of_a_newer_program_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "state"
    await fill(path)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '99'")
        database.execute("PRAGMA journal_mode=DELETE")
    assert "was written by a newer siderolink (its schema is 99" in await refusal(path)


async def test_one_server_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "state"
    async with SqlStore.open(path):
        with pytest.raises(StoreError, match="is in use by another siderolink"):
            async with SqlStore.open(path):
                pass
    await fill(path)


async def test_of_two_first_starts_at_once_one_finds_the_state_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one creates and locks the file after this one has found none."""
    path = tmp_path / "state"
    other: list[sqlite3.Connection] = []

    def create_as_second(path: Path, data: bytes) -> None:
        create_private(path, data)
        other.append(sqlite3.connect(path, isolation_level=None))
        other[0].execute("BEGIN EXCLUSIVE")
        create_private(path, data)

    monkeypatch.setattr(file_module, "create_private", create_as_second)
    monkeypatch.setattr(file_module, "BUSY_SECONDS", 0.1)
    with pytest.raises(StoreError, match="is in use by another siderolink"):
        async with SqlStore.open(path):
            pass
    assert path.exists(), "it is the other one's"
    other.pop().close()
    assert len(await fill(path)) == 1
    assert not other


@pytest.mark.parametrize("at", [1, 6, 15, 18, 26, 40])
async def test_a_cancelled_opening_leaves_the_file_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    """Cancelled at each of its statements in turn."""
    path = tmp_path / "state"
    await fill(path)
    calls = 0
    scope = anyio.CancelScope()
    execute: Callable[..., Awaitable[Any]] = vars(aiosqlite.Connection)["_execute"]

    async def cancelling(connection: aiosqlite.Connection, *args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            asyncio.get_running_loop().call_soon(scope.cancel)
        return await execute(connection, *args, **named)

    monkeypatch.setattr(aiosqlite.Connection, "_execute", cancelling)
    with scope:
        async with SqlStore.open(path):
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    monkeypatch.undo()
    assert len(await fill(path, 0)) == 1, "nobody else has it"
    assert "was not closed" not in caplog.text


async def test_a_copy_is_whole_and_never_replaces_anything(tmp_path: Path) -> None:
    path, copy = tmp_path / "state", tmp_path / "copy"
    async with SqlStore.open(path) as store:
        for number in range(20):
            await store.transact(work_of("insert", machine(number, number, overlay=number)))
        await store.backup(copy)
        with pytest.raises(StoreError, match="File exists"):
            await store.backup(copy)
        rows = [row async for row in store.machines()]
    assert await fill(copy, 0) == rows


@pytest.mark.parametrize("by", ["deleting", "replacing"])
async def test_a_file_that_another_program_took_away_is_told_and_can_be_saved(tmp_path: Path, by: str) -> None:
    path, copy = tmp_path / "state", tmp_path / "copy"
    async with SqlStore.open(path) as store:
        await store.transact(work_of("insert", machine(1, 1)))
        if by == "deleting":
            path.unlink()
        else:
            shutil.copy(path, tmp_path / "other")
            (tmp_path / "other").replace(path)
        with pytest.raises(StoreUnavailableError, match="was deleted or replaced .* so nothing is stored; save its content"):
            await store.transact(work_of("insert", machine(2, 2, overlay=2)))
        assert await store.transact(lambda transaction: transaction.machine("1")) is not None
        await store.backup(copy)
    async with SqlStore.open(copy) as saved:
        assert [row.id async for row in saved.machines()] == ["1"]


async def test_many_rows_are_read_in_pages(tmp_path: Path) -> None:
    async with SqlStore.open(tmp_path / "state") as store:
        async with anyio.create_task_group() as tasks:
            for number in range(1, 2500):
                tasks.start_soon(store.transact, work_of("insert", machine(number, number, overlay=number)))
        assert len({row.id async for row in store.machines()}) == 2499


async def test_unique_columns_hold_for_transactions_that_did_not_query_them(tmp_path: Path) -> None:
    """The database refuses the row; its transaction gets the same error, and others in the batch lose nothing."""
    errors: list[str] = []
    async with SqlStore.open(tmp_path / "state") as store:
        await store.transact(work_of("insert", machine(1, 1, overlay=7)))

        async def add(row: Machine) -> None:
            try:
                await store.transact(work_of("insert", row))
            except UniqueViolationError as error:
                errors.append(error.column)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(add, machine(2, 2, overlay=2))
            tasks.start_soon(add, machine(3, 3, overlay=7))
            tasks.start_soon(add, machine(4, 4, overlay=4))
        assert errors == ["overlay_address"]
        assert {row.id async for row in store.machines()} == {"1", "2", "4"}


def test_the_migrations_make_the_tables() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).with_name("migrations")))
    assert ScriptDirectory.from_config(config).get_current_head() == tables.HEAD


async def test_a_new_file_has_the_tables_that_the_program_knows(tmp_path: Path) -> None:
    await fill(tmp_path / "state")
    engine = create_engine(f"sqlite:///{tmp_path / 'state'}")
    try:
        found = inspect(engine)
        for table in tables.metadata.sorted_tables:
            columns = {column["name"]: column["nullable"] for column in found.get_columns(table.name)}
            assert columns == {column.name: bool(column.nullable) for column in table.columns}
            unique = {constraint["column_names"][0] for constraint in found.get_unique_constraints(table.name)}
            assert unique == {column.name for column in table.columns if column.unique}
    finally:
        engine.dispose()


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tempfile.mkdtemp()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "siderolink-test", folder], check=True)
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", folder], check=True)
        shutil.rmtree(folder)


async def test_a_full_disk_refuses_writes_and_permits_reads(small_disk: Path) -> None:
    path = small_disk / "state"
    async with SqlStore.open(path) as store:
        await store.transact(work_of("insert", machine(0, 0)))
        (small_disk / "ballast").write_bytes(bytes(_free(small_disk) - 16 * 4096))
        added = 1
        with pytest.raises(StoreFullError):
            while True:
                await store.transact(work_of("insert", machine(added, added, overlay=added)))
                added += 1
        with pytest.raises(StoreFullError):
            await store.transact(work_of("insert", machine(added, added, overlay=added)))
        known = await store.transact(lambda transaction: transaction.machine("0"))
        assert known is not None
        (small_disk / "ballast").unlink()
        await store.transact(work_of("insert", machine(added, added, overlay=added)))
        assert len([row async for row in store.machines()]) == added + 1
    assert len(await fill(path, 0)) == added + 1


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def first_schema(path: Path, later: str = "1") -> None:
    """A file as the first version of the program made it, and as a later one changed it."""
    engine = create_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(Path(tables.__file__).with_name("migrations")))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
        config.attributes["connection"] = connection
        upgrade(config, "1")
        for number in range(3):
            values = (
                f"m{number}",
                f"uuid-{number}",
                bytes([number]) * 32,
                bytes(15) + bytes([number + 1]),
                b"d" * 32,
                number > 0,
            )
            connection.exec_driver_sql(
                "INSERT INTO machines (id, node_uuid, public_key, overlay_address, unique_token_digest, talos_version, tunnel,"
                " created_at, joined_at, was_linked, revision) VALUES (?, ?, ?, ?, ?, 'v1.13.0', 0, 1.0, 2.0, ?, 7)",
                values,
            )
        connection.exec_driver_sql("INSERT INTO bans VALUES ('uuid-9')")
        upgrade(config, later)
    engine.dispose()
    path.chmod(0o600)


async def test_a_file_of_the_first_schema_still_opens_with_all_that_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first_schema(path)
    for _ in range(2):
        async with SqlStore.open(path) as store:
            rows = [row async for row in store.machines()]
            assert [(row.id, row.node_uuid, row.revision) for row in rows] == [(f"m{n}", f"uuid-{n}", 7) for n in range(3)]
            assert all(row.is_accepted for row in rows)
            assert [row.bound_digest for row in rows] == [None, b"d" * 32, b"d" * 32], "what was never proved binds nobody"
            assert list(await store.bans()) == [Ban(value="uuid-9")]
            assert await store.transact(lambda transaction: transaction.is_banned(Ban(value="uuid-9")))
            with pytest.raises(UniqueViolationError):
                await store.transact(work_of("insert", replace(machine(9, 0, overlay=77), node_uuid="uuid-0")))


async def test_a_file_of_zero_bytes_is_damaged_and_not_new(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.touch(mode=0o600)
    assert "is damaged: it is empty" in await refusal(path)


async def test_a_new_file_that_nothing_was_written_to_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise StoreError("no")

    monkeypatch.setattr("siderolink.server.store.sql.file._prepare_connection", fails)
    with pytest.raises(StoreError):
        async with SqlStore.open(tmp_path / "state"):
            pass
    assert modes(tmp_path) == {}


async def test_a_new_file_is_a_database_from_the_moment_it_appears(tmp_path: Path) -> None:
    """A start that is killed at once leaves a file that the next one uses."""
    path, reference = tmp_path / "state", tmp_path / "reference"
    assert prepare(path)
    assert not prepare(path)
    with closing(sqlite3.connect(reference)) as database, database:
        database.execute(f"PRAGMA application_id={APPLICATION_ID}")
    assert content(path)[:96] == content(reference)[:96], "the bytes that SQLite writes, up to its own version"
    assert content(path)[100:] == content(reference)[100:]
    assert modes(tmp_path)["state"] == 0o600
    assert len(await fill(path)) == 1


async def test_the_copies_of_killed_servers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    await fill(path)
    left = draft_of(path)
    others = [
        tmp_path / name for name in ("other", ".other.0123abcd", ".state.notes", ".state.key.0123abcd", ".state.0123abcde")
    ]
    for file in (left, Path(f"{left}-wal"), *others):
        file.touch()
        os.utime(file, (0, 0))
    await fill(path, 0)
    assert sorted(modes(tmp_path)) == sorted(file.name for file in (path, *others))


async def test_a_start_leaves_the_copy_of_a_running_restore(tmp_path: Path) -> None:
    path = tmp_path / "state"
    copy = draft_of(path)
    for last_written, is_left in ((time.time() - 60, True), (time.time() - 2 * 3600, False)):
        copy.touch()
        os.utime(copy, (last_written, last_written))
        await fill(path, 0)
        assert copy.exists() is is_left


async def test_a_copy_is_restored_where_directories_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []

    def refuse(descriptor: int) -> None:
        refused.append(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    state, copy = tmp_path / "state", tmp_path / "copy"
    await fill(state)
    rows = await fill(copy, 1, first=50)
    monkeypatch.setattr(os, "fsync", refuse)
    put(copy, state)
    assert len(refused) == 1
    monkeypatch.undo()
    assert await fill(state, 0) == rows


async def test_a_restored_copy_loses_nothing_of_the_state_before_it(tmp_path: Path) -> None:
    """What a killed server left in SQLite's log is in the state that is kept, and no log is left for the copy."""
    state, copy = tmp_path / "state", tmp_path / "copy"
    await fill(copy, 1, first=50)
    async with SqlStore.open(state) as store:
        for number in range(3):
            await store.transact(work_of("insert", machine(number, number, overlay=number)))
        for suffix in ("", "-wal"):  # as after SIGKILL
            shutil.copy(f"{state}{suffix}", f"{tmp_path / 'killed'}{suffix}")
    killed = tmp_path / "killed"
    assert content(Path(f"{killed}-wal"))
    put(copy, killed)
    assert "killed-wal" not in modes(tmp_path)
    assert [row.id for row in await fill(killed, 0)] == ["50"]
    assert len(await fill(tmp_path / "killed.before-restore", 0)) == 3
