"""The database: its address, its connections, and its schema.

Nothing depends on a session: no settings, no session locks, and prepared statements only on a direct connection. So a
pooler may give each transaction another session. Time limits are enforced by the client.
"""

import asyncio
import logging
import select
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import anyio
from psycopg import AsyncConnection as Driver
from psycopg import DataError
from psycopg import Error as DriverError
from psycopg.pq import TransactionStatus
from psycopg.sql import SQL, Identifier
from sqlalchemy import URL, Connection, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from siderolink.common.errors import (
    ConfigurationError,
    HostError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreUnavailableError,
    host_error,
)
from siderolink.common.hostport import is_loopback, require_lookups
from siderolink.common.tasks import to_its_end
from siderolink.common.text import one_line
from siderolink.server.store.sql.schema import HEAD, USABLE_SINCE, upgrade
from siderolink.server.store.sql.tables import metadata

log = logging.getLogger(__name__)

CONNECTIONS = 8
CONNECT_SECONDS = 3
ANSWER_SECONDS = 5.0
"""Time limit of one answer of the database."""
WAIT_SECONDS = 60.0
"""How long a transaction may wait for a free connection when many machines join at once."""
MIGRATE_SECONDS = 300.0
_INSPECTED = "is inspected"
_MIGRATION_LOCK = 0x53444C4B
_SERVERS = "siderolink"
"""The application name of servers' connections in pg_stat_activity."""
_QUERY = {
    "channel_binding",
    "gssencmode",
    "host",
    "hostaddr",
    "passfile",
    "port",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
}
_LEAVING_SECONDS, _LEAVING_CHECKS = 5.0, 25
"""How long Postgres may take to end the connections of a stopped server, and the number of polls in that time."""
_OTHERS = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = :name")
_NOT_UNIQUE = "23505"
# a serialisation failure, a deadlock, a duplicate value, and a failed queries.check
_RETRIED = {"40001", "40P01", _NOT_UNIQUE, "22012"}
_PREPARE_AFTER = 2
"""Number of executions after which a connection prepares a statement."""
_NO_SPACE = "53100"
_READ_ONLY = "25006"  # a standby, or default_transaction_read_only
# connection errors: too many connections, not ready, cancelled, shutting down, a pooler's own errors; too little memory or
# another resource; a session that Postgres ended because it was idle in a transaction, or in one for too long
_AWAY = ("08", "53", "55", "57", "25P03", "25P04")


class ContendedError(Exception):
    """Raised when a transaction lost a race and has to run again."""

    def __init__(self, reason: str, *, is_unique: bool = False) -> None:
        super().__init__(reason)
        self.is_unique = is_unique
        """Whether a unique value was already stored."""


def database_url(url: str, password: str | None = None, *, alone: bool = False) -> URL:
    """Parse the address of the database. TLS must verify its name unless it is on this host or the URL says otherwise.

    Raises ConfigurationError, without the password.
    """
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError("the store is not a URL of the form postgresql://USER@HOST:PORT/DATABASE") from None
    if found.drivername not in ("postgresql", "postgres"):
        raise ConfigurationError(f"a store is a postgresql:// URL, not {found.drivername}://")
    unknown = sorted(set(found.query) - _QUERY)
    if unknown:
        raise ConfigurationError(
            f"the store's URL has unknown parameters: {', '.join(unknown)} (not {', '.join(sorted(_QUERY))})"
        )
    if not found.database:
        raise ConfigurationError("the store's URL names no database: postgresql://USER@HOST:PORT/DATABASE")
    query = dict(found.query)
    if "sslmode" not in query and not _is_here(found):
        query["sslmode"] = "verify-full"
        query.setdefault("sslrootcert", "system")
    query["application_name"] = f"{_SERVERS} state" if alone else _SERVERS
    found = found.set(drivername="postgresql+psycopg", query=query)
    return found if password is None else found.set(password=password)


def _is_here(url: URL) -> bool:
    """Whether all its hosts are this one: a Unix socket or a loopback address."""
    given = url.query.get("host", url.host or "")
    hosts = given.split(",") if isinstance(given, str) else given

    def is_here(host: str) -> bool:
        if not host or host.startswith("/"):
            return True
        return is_loopback(host.partition(":")[0] if host.count(":") == 1 else host)  # of several, each may have a port

    return all(is_here(host) for host in hosts)


def describe(url: URL) -> str:
    """A description of the database without secrets."""
    host = url.query.get("host", url.host or "this host")
    return f"the database {url.database} at {host if isinstance(host, str) else ','.join(host)}"


@contextmanager
def translated() -> Iterator[None]:
    """Translate database errors to ContendedError, StoreUnavailableError, StoreReadOnlyError, StoreFullError or StoreError.

    No message contains a row's values.
    """
    try:
        yield
    except (SQLAlchemyError, DriverError, TimeoutError, UnicodeError) as error:
        raise _translate(error) from error


def answer_awaited() -> AbstractContextManager[object]:
    """Await the database's answer within its time limit, shielded from cancellation.

    Otherwise each caller that gives up would cost its connection. Raises TimeoutError.
    """
    return anyio.fail_after(ANSWER_SECONDS, shield=True)


def _translate(error: Exception) -> Exception:
    if isinstance(error, PoolTimeoutError):
        return StoreUnavailableError("the database is busy or does not answer")
    if isinstance(error, TimeoutError):
        return StoreUnavailableError("the database does not answer in time")
    is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
    cause = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(cause, DriverError):
        return StoreError(f"the database cannot be used: {type(error).__name__}")
    state = cause.sqlstate or ""
    # the first line only: the following DETAIL contains the row's values
    reason = one_line(str(cause).partition("\n")[0])
    if state in _RETRIED:
        return ContendedError(reason, is_unique=state == _NOT_UNIQUE)
    if state == _NO_SPACE:
        return StoreFullError("the state cannot grow: the database's disk is full")
    if state == _READ_ONLY:
        return StoreReadOnlyError(f"the database takes no changes: {reason}")
    is_refused_here = isinstance(cause, DataError) and not state  # a text that Postgres cannot hold
    if is_lost or not (state or is_refused_here) or state.startswith(_AWAY):
        return StoreUnavailableError(f"the database does not answer: {reason}")
    return StoreError(f"the database refuses: {reason}")


def is_outcome_unknown(error: StoreUnavailableError) -> bool:
    """Whether a COMMIT that ended with this error may have succeeded: its answer was lost, or its session was ended."""
    cause = error.__cause__
    cause = cause.orig if isinstance(cause, DBAPIError) else cause
    state = cause.sqlstate if isinstance(cause, DriverError) else None
    return not state or state.startswith(("08", "57P"))


class Database:
    """Connections to one database, each in autocommit mode.

    Waiting callers get a connection in order of arrival; the pool alone would give it to the first caller after it is free, and
    under load some callers would wait forever. One connection is reserved for urgent work.
    """

    def __init__(self, url: URL, *, connections: int = CONNECTIONS) -> None:
        self.name = describe(url)
        self._url = url
        self._ordinary = anyio.Semaphore(max(1, connections - 1), fast_acquire=True)
        self._arguments: dict[str, Any] = {
            "prepare_threshold": None,
            "connect_timeout": CONNECT_SECONDS,
            "keepalives_idle": 15,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15_000,
        }
        self._engine: AsyncEngine = create_async_engine(
            url,
            isolation_level="AUTOCOMMIT",
            pool_size=connections,
            max_overflow=0,
            pool_timeout=WAIT_SECONDS,
            pool_use_lifo=True,
            pool_reset_on_return=None,
            hide_parameters=True,
            connect_args=self._arguments | {"async_creator_fn": connect},
        )

    @asynccontextmanager
    async def connect(self, seconds: float = ANSWER_SECONDS, *, urgent: bool = False) -> AsyncIterator[AsyncConnection]:
        """A connection for single statements. Raises like `translated`.

        The body must end within `seconds`; the wait for a connection has its own limit.
        """
        with translated():
            if not urgent:
                await self._await_turn()
            try:
                connection = await self._living()
                try:
                    with anyio.fail_after(seconds):
                        yield connection
                finally:
                    await _release(connection)
            finally:
                if not urgent:
                    self._ordinary.release()

    async def _await_turn(self) -> None:
        try:
            self._ordinary.acquire_nowait()
        except anyio.WouldBlock:
            with anyio.move_on_after(WAIT_SECONDS):
                await self._ordinary.acquire()
                return
            raise StoreUnavailableError("the database is busy or does not answer") from None

    @asynccontextmanager
    async def driver(self, seconds: float = ANSWER_SECONDS, *, urgent: bool = False) -> AsyncIterator[Driver]:
        """Like `connect`, for statements run directly on the driver. A transaction still open at the end is rolled back."""
        async with self.connect(seconds, urgent=urgent) as connection:
            driver, info = _driver_of(connection), connection.sync_connection.info  # type: ignore[union-attr]
            if _INSPECTED not in info:
                await _inspect_session(driver)
                info[_INSPECTED] = True
            try:
                yield driver
            except DriverError:
                info.pop(_INSPECTED, None)
                raise

    async def _living(self) -> AsyncConnection:
        """A connection from the pool that has not ended while it was idle."""
        while True:
            connection = await self._engine.connect()
            if not _has_ended(_driver_of(connection)):
                return connection
            with anyio.CancelScope(shield=True):
                await connection.invalidate()
                await connection.close()

    @asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator[AsyncIterator[object]]:
        """Receive notifications on a separate connection. Raises like `translated`."""
        _, named = self._engine.dialect.create_connect_args(self._url)
        arguments: dict[str, Any] = {**named, **self._arguments, "autocommit": True}
        with translated():
            with anyio.fail_after(ANSWER_SECONDS):
                driver = await connect(**arguments)
            try:
                with anyio.fail_after(ANSWER_SECONDS):
                    await driver.execute(SQL("LISTEN {}").format(Identifier(channel)))
                yield driver.notifies()
            finally:
                with anyio.CancelScope(shield=True):
                    await driver.close()

    async def close(self) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(ANSWER_SECONDS):
            await self._engine.dispose()

    async def prepare(self, *, alone: bool = False) -> None:
        """Upgrade the schema, one server at a time; with `alone` only while no server runs. Raises StoreError."""
        engine = create_async_engine(
            self._url,
            isolation_level="READ COMMITTED",
            poolclass=NullPool,
            hide_parameters=True,
            connect_args=self._arguments | {"async_creator_fn": connect},
        )
        try:
            with translated(), anyio.fail_after(MIGRATE_SECONDS):
                if alone:
                    await self._wait_until_unused(engine)
                async with engine.begin() as connection:
                    await connection.run_sync(self._migrate)
                    if alone and await _is_used(connection):
                        raise self._used()
        except ContendedError as error:
            raise StoreUnavailableError(f"{self.name} cannot be prepared now: {error}") from error

    async def _wait_until_unused(self, engine: AsyncEngine) -> None:
        """Wait for the connections of a server that has just stopped to end. Raises StoreError."""
        for _ in range(_LEAVING_CHECKS):
            async with engine.connect() as connection:
                if not await _is_used(connection):
                    return
            await anyio.sleep(_LEAVING_SECONDS / _LEAVING_CHECKS)
        raise self._used()

    def _used(self) -> StoreError:
        return StoreError(f"a server uses {self.name}; stop it first")

    def _migrate(self, connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
        names = inspect(connection).get_table_names()
        if names and "alembic_version" not in names:
            raise StoreError(f"{self.name} contains other data; it was not changed. Give siderolink a database of its own")
        version = self._version(connection) if names else None
        if names and version != HEAD and _is_usable(connection):
            log.warning("%s has the schema of a newer release, which this one can use", self.name)
        elif version != HEAD:
            upgrade(connection, version, self.name)
            connection.execute(text("UPDATE feed SET usable_since = :since"), {"since": USABLE_SINCE})
        self._check(connection)
        # After restoring a dump from another cluster, transaction ids start lower: old changes would be read as new.
        connection.execute(text("DELETE FROM changes WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())"))
        connection.execute(text("UPDATE feed SET pruned = '0' WHERE pruned >= pg_snapshot_xmax(pg_current_snapshot())"))

    def _version(self, connection: Connection) -> str:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
        if len(found) != 1:
            raise self._damaged(f"the table alembic_version, which records its schema, has {len(found)} rows instead of one")
        return str(found[0])

    def _check(self, connection: Connection) -> None:
        """Find tables and columns that were lost, such as by a dump that was restored in part. Raises StoreError."""
        asked = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()"
        found = {tuple(row) for row in connection.execute(text(asked))}
        for table in metadata.sorted_tables:
            missing = sorted(column.name for column in table.columns if (table.name, column.name) not in found)
            if missing:
                raise self._damaged(f"its table {table.name} lacks the column {missing[0]}, or is missing")

    def _damaged(self, reason: str) -> StoreError:
        return StoreError(f"{self.name} is damaged; it was not changed: {reason}; restore a dump, or give an empty database")


async def connect(*address: str, **arguments: Any) -> Driver:
    """Connect. When cancelled, wait up to CONNECT_SECONDS to close the connection, which would otherwise leak for a while.

    Raises DriverError, or StoreUnavailableError if this host has no thread for a lookup.
    """
    made: list[Driver] = []

    async def make() -> None:
        made.append(await Driver.connect(*address, **arguments))

    try:
        require_lookups()
        await to_its_end(make())
    except (HostError, RuntimeError) as error:  # asyncio's own lookups run in threads
        if (failure := host_error(error)) is None:
            raise
        raise StoreUnavailableError(f"the database cannot be reached: {failure}") from error
    except asyncio.CancelledError:
        for driver in made:
            await to_its_end(driver.close())
        raise
    return made[0]


async def _is_used(connection: AsyncConnection) -> bool:
    return bool((await connection.execute(_OTHERS, {"name": _SERVERS})).scalar())


def _is_usable(connection: Connection) -> bool:
    """Whether the database's schema is newer, but usable by this program."""
    asked = "SELECT FROM information_schema.columns WHERE table_name = 'feed' AND column_name = 'usable_since'"
    if connection.execute(text(asked)).first() is None:
        return False
    row = connection.execute(text("SELECT version_num, usable_since FROM alembic_version, feed")).one()
    return bool(row.version_num.isdigit() and int(row.version_num) > int(HEAD) >= row.usable_since)


def _driver_of(connection: AsyncConnection) -> Driver:
    found = connection.sync_connection.connection.driver_connection  # type: ignore[union-attr]
    assert isinstance(found, Driver)
    return found


def _is_idle(driver: Driver) -> bool:
    return driver.info.transaction_status is TransactionStatus.IDLE


def _has_ended(driver: Driver) -> bool:
    """Whether the database has ended an idle connection: that is the only reason for one to become readable."""
    if driver.closed:
        return True
    poll = select.poll()
    poll.register(driver.fileno(), select.POLLIN)
    return bool(poll.poll(0))


async def _inspect_session(driver: Driver) -> None:
    """Enable prepared statements if the session is Postgres's own. A pooler reports another backend pid."""
    if driver.prepare_threshold is not None:
        # After an error the driver believes that statements skipped by the database are prepared; a rollback clears them.
        await driver.execute("BEGIN")
        await driver.rollback()
        return
    found = await (await driver.execute("SELECT pg_backend_pid(), current_setting('transaction_isolation')")).fetchone()
    assert found is not None
    pid, isolation = found
    if isolation != "read committed":
        raise StoreError(
            f"the database's default_transaction_isolation is {isolation}; siderolink needs read committed: "
            "ALTER ROLE ... SET default_transaction_isolation = 'read committed'"
        )
    if pid == driver.info.backend_pid:
        driver.prepare_threshold = _PREPARE_AFTER


async def _release(connection: AsyncConnection) -> None:
    """Return the connection to the pool; close it if it is in an undefined state."""
    driver = None if connection.invalidated else _driver_of(connection)
    with anyio.CancelScope(shield=True):
        if driver is not None and not _is_idle(driver):
            with anyio.move_on_after(1.0):
                await _undo(driver)
            if not _is_idle(driver):
                await connection.invalidate()
        await connection.close()


async def _undo(driver: Driver) -> None:
    try:
        await driver.rollback()
    except DriverError as error:
        log.debug("could not roll back, the connection is closed: %s", error)
