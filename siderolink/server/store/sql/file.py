"""The state file: readable only by its owner, checked before it is opened, locked while it is open.

A file that is damaged, foreign or newer than this program is left unchanged.
"""

import logging
import os
import sqlite3
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
from sqlalchemy import (
    URL,
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    Text,
    event,
    func,
    inspect,
    literal,
    or_,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool
from sqlalchemy.types import TypeEngine

from siderolink.common.errors import StoreError, StoreFullError, StoreReadOnlyError
from siderolink.common.private_files import create_private, remove_drafts
from siderolink.common.tasks import to_its_end
from siderolink.common.text import one_line
from siderolink.server.store.sql.schema import HEAD, upgrade
from siderolink.server.store.sql.tables import metadata

log = logging.getLogger(__name__)

APPLICATION_ID = 0x53444C4B
"""The application id in our SQLite files (bytes 68 to 71 of the header)."""
_MAGIC = b"SQLite format 3\0"
_STORAGE: list[tuple[type[TypeEngine[Any]], list[str]]] = [
    (Text, ["text"]),
    (LargeBinary, ["blob"]),
    (Float, ["real", "integer"]),
    (Integer, ["integer"]),
    (Boolean, ["integer"]),
]
_HEADER_BYTES = 100
_PAGE_BYTES = 4096
_FULL = "database or disk is full"
_FAILING = ("disk I/O error", "readonly database", "unable to open database file")
"""Parts of SQLite's messages about a disk that fails, or that was mounted read-only."""
_VERSIONS = "alembic_version"
_DAMAGE = ("malformed", "not a database", "no such table", "no such column", "already exists", "duplicate column")
"""Parts of SQLite's messages about a file that is damaged or was not written by this program."""
CLOSE_SECONDS = 5.0
"""Time limit of closing; SQLite recovers the rest at its next start."""
BUSY_SECONDS = 2.0
"""How long to wait for a previous process to release the file."""


def _first_page() -> bytes:
    """A database without tables (SQLite's file format, sections 1.3 and 1.6), so that no start finds an empty file."""
    header = _MAGIC + struct.pack(
        ">HBBBBBB12I20x2I",
        *(_PAGE_BYTES, 1, 1, 0, 64, 32, 32),  # 1, 1: a rollback journal; opening the file turns it into WAL
        *(1, 1, *[0] * 9, APPLICATION_ID),  # change counter and pages; the first table sets format and encoding
        *(1, 3_040_000),  # change counter again, and an SQLite version that may have written this
    )
    leaf = struct.pack(">BHHHB", 13, 0, 0, _PAGE_BYTES, 0)
    return (header + leaf).ljust(_PAGE_BYTES, b"\0")


def prepare(path: Path) -> bool:
    """Create the file, or check it without changing it. Returns whether it was created. Raises StoreError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = _open_or_create(path)
    except OSError as error:
        if path.is_symlink():
            raise StoreError(
                f"the state file {path} is a symbolic link, which another user of the directory could change; "
                "give the path of the file itself"
            ) from None
        raise StoreError(f"the state file {path} cannot be opened: {error.strerror}") from None
    if descriptor is None:
        return True
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"the state file {path} is not a regular file")
        header = os.pread(descriptor, _HEADER_BYTES, 0)
        if not header:
            raise StoreError(f"the state file {path} is damaged: it is empty; restore a backup, or remove it to start over")
        if header[:16] != _MAGIC or int.from_bytes(header[68:72]) != APPLICATION_ID:
            raise StoreError(f"{path} is not a siderolink state file; it was not changed")
        if status.st_mode & 0o077:
            log.warning("the state file %s was readable by other users; its permissions were restricted", path)
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    return False


def _open_or_create(path: Path) -> int | None:
    """The descriptor of an existing file; None if the file was created. Raises OSError."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        try:
            create_private(path, _first_page())
        except FileExistsError:  # another start was faster
            return os.open(path, flags)
    return None


class Place:
    """Where an open state file is: another program may delete it, or put another one there."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError if there is no file."""
        self._path = path.absolute()  # a process may change its folder
        self._file: tuple[int, int] | None = None
        self._file = self._found()
        self.check()

    def check(self) -> None:
        """Raises StoreReadOnlyError if what is written now would be lost at the end of this process."""
        if self._file is None or self._found() != self._file:
            raise StoreReadOnlyError(
                f"the state file {self._path} was deleted or replaced by another program while it was open, so nothing is "
                "stored; save its content with `siderolink state backup`, stop the server, and use `siderolink state restore`"
            )

    def _found(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:  # says nothing about the file; a write tells what is wrong
            return self._file
        return status.st_dev, status.st_ino


@asynccontextmanager
async def open_file(path: Path) -> AsyncIterator[AsyncConnection]:
    """The one connection to a valid file; an older schema is upgraded first. Raises StoreError."""
    is_new = prepare(path)
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        poolclass=StaticPool,
        connect_args={"timeout": BUSY_SECONDS},
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "connect", _set_up)
    stack = AsyncExitStack()
    stack.push_async_callback(engine.dispose)
    try:
        try:
            # If this were cancelled during a statement, SQLAlchemy would stop the driver's thread, and closing wait for it.
            connection = await to_its_end(_connect(stack, engine, path))
        except DBAPIError as error:
            is_new = is_new and not _is_locked(error)  # or another start has it already
            raise _unusable(path, error) from error
        yield connection
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS) as limit:
            await stack.aclose()
        if limit.cancelled_caught:
            log.warning("the state file %s was not closed within %g s; the next start recovers it", path, CLOSE_SECONDS)
        if is_new:
            _remove_if_unused(path)


async def _connect(stack: AsyncExitStack, engine: AsyncEngine, path: Path) -> AsyncConnection:
    connection = await stack.enter_async_context(engine.connect())
    await connection.run_sync(_check, path)
    remove_drafts(path)
    return connection


def _remove_if_unused(path: Path) -> None:
    """Remove a new file that was never written to."""
    try:
        if path.stat().st_size == _PAGE_BYTES and path.read_bytes() == _first_page():
            path.unlink()
    except OSError:
        pass


def _set_up(dbapi_connection: Any, _: object) -> None:
    try:
        _prepare_connection(dbapi_connection)
    except BaseException:
        dbapi_connection.close()  # not shared yet
        raise


def _prepare_connection(dbapi_connection: Any) -> None:
    # Reads need no transaction on the only connection; the first write begins one.
    dbapi_connection.isolation_level = "IMMEDIATE"
    cursor = dbapi_connection.cursor()
    # One server per file. Without sharing there is also no memory-mapped index, which a full disk could break.
    cursor.execute("PRAGMA locking_mode=EXCLUSIVE")
    cursor.execute("PRAGMA trusted_schema=OFF")
    cursor.execute("PRAGMA secure_delete=ON")  # no free page keeps a secret from before it was sealed
    cursor.execute("BEGIN EXCLUSIVE")
    cursor.execute("PRAGMA application_id")
    if cursor.fetchone()[0] != APPLICATION_ID:
        cursor.execute(f"PRAGMA application_id={APPLICATION_ID}")
    cursor.execute("COMMIT")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a commit is on the disk before it is answered
    cursor.close()


def _check(connection: Connection, path: Path) -> None:
    with connection.begin():
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        faults = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if faults != "ok":
            raise _damaged(path, one_line(str(faults)))
        version = _version(connection, path)
        if version != HEAD:
            upgrade(connection, version, f"the state file {path}")
        missing = {table.name for table in metadata.sorted_tables} - set(inspect(connection).get_table_names())
        if missing:
            raise _damaged(path, f"it lacks the table {min(missing)}")
        odd = _odd_column(connection)
        if odd is not None:
            raise _damaged(path, f"a row has no proper value in {odd}")


def _version(connection: Connection, path: Path) -> str | None:
    """The schema's version; None for a new file. Raises StoreError."""
    tables = inspect(connection).get_table_names()
    if not tables:
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() if _VERSIONS in tables else []
    if len(found) != 1:
        raise _damaged(path, f"the table {_VERSIONS}, which records its schema, has {len(found)} rows instead of one")
    return str(found[0])


def _odd_column(connection: Connection) -> str | None:
    """A column with a value of a type other than the column's, which SQLite permits; None if there is none."""
    for table in metadata.sorted_tables:
        is_odd = {str(column): func.typeof(column).not_in(_storage(column)) for column in table.columns}
        if connection.execute(select(literal(1)).select_from(table).where(or_(*is_odd.values())).limit(1)).first() is not None:
            row = connection.execute(select(*is_odd.values()).where(or_(*is_odd.values())).limit(1)).one()
            return next(name for name, is_this in zip(is_odd, row, strict=True) if is_this)
    return None


def _storage(column: Column[Any]) -> list[str]:
    """How SQLite may store the column's values."""
    kinds = next(kinds for of, kinds in _STORAGE if isinstance(column.type, of))
    return [*kinds, "null"] if column.nullable else kinds


@contextmanager
def translated() -> Iterator[None]:
    """Translate database errors to StoreFullError, StoreReadOnlyError or StoreError. No message contains a row's values."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        reason = one_line(str(error.orig if isinstance(error, DBAPIError) else error))
        if _FULL in reason:
            raise StoreFullError("the state cannot be written: the disk is full") from error
        if any(sign in reason for sign in _FAILING):
            raise StoreReadOnlyError(f"the state cannot be read or written: {reason}; check its disk") from error
        raise StoreError(f"the state cannot be read or written: {reason}") from error
    except (SQLAlchemyError, UnicodeError, OverflowError) as error:  # the last two: a value that no column can hold
        raise StoreError(f"the state cannot be read or written: {type(error).__name__}") from error


def _unusable(path: Path, error: DBAPIError) -> StoreError:
    reason = one_line(str(error.orig))
    if _is_locked(error):
        return StoreError(f"the state file {path} is in use by another siderolink")
    if any(sign in reason for sign in _DAMAGE):
        return _damaged(path, reason)
    return StoreError(f"the state file {path} cannot be used: {reason}")


def _is_locked(error: DBAPIError) -> bool:
    return "locked" in str(error.orig)


def _damaged(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"the state file {path} is damaged; it was not changed: {reason}; restore a backup, or move the file away to start over"
    )
