"""Migrations that are killed at each of their steps: the state is what it was, or complete, and the next try succeeds."""

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from siderolink.common.keys import PrivateKey
from siderolink.server.store import AuditEntry, AuditQuery, Ban, ServerRecord, Store, Transaction
from siderolink.server.store.audit import EMBEDDER
from siderolink.server.store.sealing import write_key
from siderolink.server.store.sql import SqlStore
from siderolink.server.store.sql.postgres import PostgresStore
from siderolink.server.store.sql.tables import HEAD
from tests.support.postgres import STATE_KEY, cluster
from tests.unit.server.test_state_file import first_schema
from tests.unit.server.test_store import machine

MOVES = """
import os, signal, sys
from pathlib import Path
from siderolink.cli import state_migration
from siderolink.server.store.sql import SqlStore
from siderolink.server.store.sql.postgres import PostgresStore

left = int(sys.argv[1])

def dying(function):
    def run(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return run

for kind in (SqlStore, PostgresStore):
    for name in ("transact", "prune_audit", "delete_history", "machines"):
        setattr(kind, name, dying(getattr(kind, name)))
state_migration.give_name = dying(state_migration.give_name)
state_migration.run_migrate(sys.argv[2], sys.argv[3], None, Path(sys.argv[4]))
"""
OPENS = """
import os, signal, sys
from pathlib import Path
import anyio
from sqlalchemy import Engine, event
from siderolink.server.store.sql import SqlStore

left = int(sys.argv[1])

def count(*args):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(Engine, "before_cursor_execute", count)
event.listen(Engine, "commit", count)

async def work():
    async with SqlStore.open(Path(sys.argv[2])):
        os._exit(0)

anyio.run(work)
"""


@pytest.fixture
def url() -> Iterator[str]:
    with cluster().database() as name:
        yield cluster().url(name)


def run(program: str, steps: int, *arguments: object) -> bool:
    """Whether the program reached its end within so many steps; otherwise it was killed."""
    command = [sys.executable, "-c", program, str(steps), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode == 0


async def fill(transaction: Transaction) -> None:
    for number in range(3):
        await transaction.insert(machine(number, number, key=number, overlay=number))
    await transaction.set_banned(Ban(value="uuid-9"), True)
    await transaction.audit(AuditEntry(at=1.0, actor=EMBEDDER, action="test", object_kind="test"))
    await transaction.set_server(ServerRecord(private_key=bytes(PrivateKey.generate()), installation_id="here"))


async def content(store: Store) -> tuple[list[str], list[str], bool]:
    """Machines, audited actions, and whether there is a server."""
    entries = await store.audit_entries(AuditQuery(limit=100))
    record = await store.transact(lambda transaction: transaction.server())
    return sorted([row.id async for row in store.machines()]), [entry.action for entry in entries], record is not None


WHOLE = ["0", "1", "2"], ["test"], True


@pytest.mark.timeout(240)
def test_a_state_whose_move_to_another_store_is_killed_moves_the_next_time(tmp_path: Path, url: str) -> None:
    source, back, key = tmp_path / "state", tmp_path / "back", tmp_path / "key"
    write_key(key, STATE_KEY.read() or b"")

    async def make() -> None:
        async with SqlStore.open(source) as store:
            await store.transact(fill)

    async def look_at_database() -> None:
        async with PostgresStore.open(url, key=STATE_KEY, alone=True) as store:
            assert await content(store) == WHOLE

    async def look_at_file() -> None:
        async with SqlStore.open(back, key=STATE_KEY) as store:
            assert await content(store) == WHOLE

    anyio.run(make)
    steps = 0
    while not run(MOVES, steps, source, url, key):
        steps += 1
    assert steps > 5
    anyio.run(look_at_database)
    steps = 0
    while not run(MOVES, steps, url, back, key):
        steps += 1
        assert not back.exists()
    assert steps > 5
    anyio.run(look_at_file)


@pytest.mark.timeout(240)
def test_a_file_whose_upgrade_is_killed_opens_the_next_time(tmp_path: Path) -> None:
    steps, stride, versions = 0, 9, []
    while True:
        path = tmp_path / str(steps) / "state"
        path.parent.mkdir()
        first_schema(path)
        if run(OPENS, steps, path):
            break
        with closing(sqlite3.connect(path)) as database:  # rolls back what the killed one began
            versions += database.execute("SELECT version_num FROM alembic_version").fetchall()
            assert database.execute("SELECT count(*) FROM machines").fetchone() == (3,)
        assert run(OPENS, sys.maxsize, path)
        steps += stride
    assert set(versions) <= {("1",), (HEAD,)}
    assert versions.count(("1",)) > 5
