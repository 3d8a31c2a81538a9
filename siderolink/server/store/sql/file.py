"""The state file: readable only by its owner, checked before it is opened, locked while it is open.

A file that is damaged, foreign or newer than this program is left unchanged.
"""

import logging
import os
import sqlite3
import stat
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
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import StaticPool
from sqlalchemy.types import TypeEngine

from siderolink.common.errors import StoreError, StoreFullError
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
_FULL = "database or disk is full"
CLOSE_SECONDS = 5.0
"""Time limit of closing; SQLite recovers the rest at its next start."""
BUSY_SECONDS = 2.0
"""How long to wait for a previous process to release the file."""


def prepare(path: Path) -> bool:
    """Create the file, or check it without changing it. Returns whether it was created. Raises StoreError."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.close(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600))
            return True
        except FileExistsError:
            descriptor = os.open(path, flags)
    except OSError as error:
        raise StoreError(f"the state file {path} cannot be opened: {error.strerror}") from None
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
            connection = await stack.enter_async_context(engine.connect())
            await connection.run_sync(_check, path)
        except DBAPIError as error:
            raise _unusable(path, error) from error
        yield connection
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_SECONDS):
            await stack.aclose()
        if is_new:
            _remove_if_empty(path)


def _remove_if_empty(path: Path) -> None:
    """Remove a new file that was never written to; otherwise the next start would consider it damaged."""
    try:
        if not path.stat().st_size:
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
            raise StoreError(f"the state file {path} is damaged; it was not changed: {one_line(str(faults))}")
        tables = inspect(connection).get_table_names()
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if tables else None
        if version != HEAD:
            upgrade(connection, version, f"the state file {path}")
        odd = _odd_column(connection)
        if odd is not None:
            raise StoreError(f"the state file {path} is damaged; it was not changed: a row has no proper value in {odd}")


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
    """Translate database errors to StoreFullError or StoreError. No message contains a row's values."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        reason = one_line(str(error.orig if isinstance(error, DBAPIError) else error))
        if _FULL in reason:
            raise StoreFullError("the state cannot be written: the disk is full") from error
        raise StoreError(f"the state cannot be read or written: {reason}") from error
    except (SQLAlchemyError, UnicodeError, OverflowError) as error:  # the last two: a value that no column can hold
        raise StoreError(f"the state cannot be read or written: {type(error).__name__}") from error


def _unusable(path: Path, error: DBAPIError) -> StoreError:
    reason = one_line(str(error.orig))
    if "locked" in reason:
        return StoreError(f"the state file {path} is in use by another siderolink")
    if "malformed" in reason or "not a database" in reason:
        return StoreError(f"the state file {path} is damaged; it was not changed: {reason}")
    return StoreError(f"the state file {path} cannot be used: {reason}")
