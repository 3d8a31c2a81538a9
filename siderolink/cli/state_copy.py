"""A copy of a server's state: validated first, then put in place of the state."""

import fcntl
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from siderolink.common.errors import StoreError
from siderolink.common.private_files import link_or_copy, sync_directory_of
from siderolink.server.store.sealing import SERVER_KEY, StateKey
from siderolink.server.store.sql import SqlStore

_MAGIC = b"SQLite format 3\0"
"""The magic header of SQLite files (file format, section 1.3)."""


async def check(path: Path, key: StateKey) -> int:
    """Validate a copy and its key; returns its number of machines. Raises StoreError."""
    try:
        async with SqlStore.open(path, key=key) as store:
            record = await store.transact(lambda transaction: transaction.server())
            if record is None:
                raise StoreError("the copy contains no server")
            store.sealer.open(record.private_key, SERVER_KEY)
            return len([machine.id async for machine in store.machines()])
    except StoreError as error:
        raise StoreError(str(error).replace(str(path), "that was given")) from None
    finally:
        _forget_companions(path)


def _forget_companions(path: Path) -> None:
    """Remove the files that SQLite leaves beside a database that was not closed properly."""
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def refuse_in_use(state: Path) -> None:
    """Raises StoreError if a server has the state open, even if the state is damaged."""
    if not state.exists():
        return
    with state.open("r+b") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"{state} is in use by a running server; omit --state to restore into it") from None


def put(copy: Path, state: Path) -> None:
    """Replace the state with the copy and keep the old state under another name. Raises OSError."""
    old = state.with_name(f"{state.name}.before-restore")
    old.unlink(missing_ok=True)
    _forget_companions(old)
    _fold_log(state, old)
    if state.exists():
        link_or_copy(state, old)
    os.replace(copy, state)
    sync_directory_of(state)


def _fold_log(state: Path, old: Path) -> None:
    """Merge SQLite's write-ahead log, left by a crashed server, into the state before removing the log.

    So there is a complete state at every moment, in place or under its old name. A damaged state keeps its log.
    """
    log = Path(f"{state}-wal")
    if not log.exists():
        _forget_companions(state)
        return
    try:
        with state.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                raise sqlite3.DatabaseError  # otherwise SQLite would write the log's pages over it
        with closing(sqlite3.connect(state, timeout=0.0)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            database.execute("PRAGMA journal_mode=DELETE").fetchall()
    except (sqlite3.Error, OSError):
        os.replace(log, f"{old}-wal")
    _forget_companions(state)
