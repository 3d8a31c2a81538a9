"""The way to the database: its address, what its connections ask for, and its schema.

Nothing rests on a session: no prepared statements, no settings, no session locks. So a pooler that gives each transaction
another session may stand between. What is slow is given up by the client.
"""

import ipaddress
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import anyio
from psycopg import AsyncConnection as Driver
from psycopg import Error as DriverError
from psycopg.sql import SQL, Identifier
from sqlalchemy import URL, Connection, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from siderolink.common.errors import ConfigurationError, StoreError, StoreFullError, StoreUnavailableError
from siderolink.common.text import one_line
from siderolink.server.store.sql.schema import HEAD, is_next, upgrade

log = logging.getLogger(__name__)

CONNECTIONS = 8
CONNECT_SECONDS = 3
ANSWER_SECONDS = 5.0
"""How long the database may take for one transaction, and for letting go of one connection."""
WAIT_SECONDS = 15.0
"""How long a transaction may wait for one of the connections: when many machines join at once."""
MIGRATE_SECONDS = 300.0
_MIGRATION_LOCK = 0x53444C4B
_SERVERS = "siderolink"
"""What servers' connections are called in pg_stat_activity."""
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
_OTHERS = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = :name")
_SERIALISATION, _DEADLOCK, _NOT_UNIQUE = "40001", "40P01", "23505"
_RETRIED = {_SERIALISATION, _DEADLOCK, _NOT_UNIQUE}
_NO_SPACE = "53100"
# too many connections, not in a state to be used, cancelled, going down, a standby, and a pooler's own errors
_AWAY = ("08", "53300", "55", "57", "25006")


class ContendedError(Exception):
    """Raised when a transaction lost a race and shall run again."""

    def __init__(self, reason: str, *, is_unique: bool = False) -> None:
        super().__init__(reason)
        self.is_unique = is_unique
        """Whether a value was stored already."""


def database_url(url: str, password: str | None = None, *, alone: bool = False) -> URL:
    """Where the database is, with TLS that proves its name unless it is on this host or the address says otherwise.

    Raises ConfigurationError, without the password.
    """
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigurationError("the store is no URL of the form postgresql://USER@HOST:PORT/DATABASE") from None
    if found.drivername not in ("postgresql", "postgres"):
        raise ConfigurationError(f"a store is a postgresql:// URL, not {found.drivername}://")
    unknown = sorted(set(found.query) - _QUERY)
    if unknown:
        raise ConfigurationError(f"the store's URL asks for {', '.join(unknown)}; it may say {', '.join(sorted(_QUERY))}")
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
    """Whether every host is this one: a Unix socket or a loopback address."""
    given = url.query.get("host", url.host or "")
    hosts = given.split(",") if isinstance(given, str) else given

    def is_loopback(host: str) -> bool:
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host in ("", "localhost") or host.startswith("/")

    return all(is_loopback(host) for host in hosts)


def describe(url: URL) -> str:
    """The database's name for people, without secrets."""
    host = url.query.get("host", url.host or "this host")
    return f"the database {url.database} at {host if isinstance(host, str) else ','.join(host)}"


@contextmanager
def told() -> Iterator[None]:
    """Raises ContendedError, StoreUnavailableError, StoreFullError or StoreError for what the database raises.

    No message holds a row's values.
    """
    try:
        yield
    except (SQLAlchemyError, DriverError, TimeoutError) as error:
        raise _translate(error) from error


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
    # the first line alone: the following ones are DETAIL, with the row's values
    reason = one_line(str(cause).partition("\n")[0])
    if state in _RETRIED:
        return ContendedError(reason, is_unique=state == _NOT_UNIQUE)
    if state == _NO_SPACE:
        return StoreFullError("the state cannot grow: the database's disk is full")
    if is_lost or not state or state.startswith(_AWAY):
        return StoreUnavailableError(f"the database does not answer: {reason}")
    return StoreError(f"the database refuses: {reason}")


class Database:
    """Connections to one database."""

    def __init__(self, url: URL, *, connections: int = CONNECTIONS) -> None:
        self.name = describe(url)
        self._url = url
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
            isolation_level="READ COMMITTED",
            pool_size=connections,
            max_overflow=0,
            pool_timeout=WAIT_SECONDS,
            pool_use_lifo=True,
            hide_parameters=True,
            connect_args=self._arguments,
        )

    @asynccontextmanager
    async def connect(self, seconds: float = ANSWER_SECONDS) -> AsyncIterator[AsyncConnection]:
        """A connection for one transaction, which is undone where it was not committed. Raises as `told`.

        The body has to end within the seconds; waiting for a connection has a limit of its own.
        """
        with told():
            connection = await self._engine.connect()
            try:
                with anyio.fail_after(seconds):
                    yield connection
            finally:
                await _let_go(connection)

    @asynccontextmanager
    async def listen(self, channel: str) -> AsyncIterator[AsyncIterator[object]]:
        """Notifications, by a connection of their own. Raises as `told`."""
        _, named = self._engine.dialect.create_connect_args(self._url)
        arguments: dict[str, Any] = {**named, **self._arguments, "autocommit": True}
        with told():
            with anyio.fail_after(ANSWER_SECONDS):
                driver = await Driver.connect(**arguments)
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
        """Bring the schema up to this program's, on one server at a time; if `alone`, while none runs. Raises StoreError."""
        try:
            async with self.connect(MIGRATE_SECONDS) as connection:
                await connection.run_sync(self._migrate)
                if alone and (await connection.execute(_OTHERS, {"name": _SERVERS})).scalar():
                    raise StoreError(f"a server uses {self.name}; stop it first")
                await connection.commit()
        except ContendedError as error:
            raise StoreUnavailableError(f"{self.name} cannot be prepared now: {error}") from error

    def _migrate(self, connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
        names = inspect(connection).get_table_names()
        if names and "alembic_version" not in names:
            raise StoreError(f"{self.name} holds something else; it was not changed. Give siderolink a database of its own")
        version = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if names else None
        if is_next(version):
            log.warning("%s has the schema of the next release, which this one can use", self.name)
        elif version != HEAD:
            upgrade(connection, version, self.name)
        # After a restore of a dump of another cluster: transactions that are still to come would bring old changes as new.
        connection.execute(text("DELETE FROM changes WHERE xid >= pg_snapshot_xmax(pg_current_snapshot())"))
        connection.execute(text("UPDATE feed SET pruned = '0' WHERE pruned >= pg_snapshot_xmax(pg_current_snapshot())"))


async def _let_go(connection: AsyncConnection) -> None:
    """Give the connection back, or end it where that takes long."""
    with anyio.CancelScope(shield=True):
        with anyio.move_on_after(1.0) as scope:
            await connection.close()
        if scope.cancelled_caught:
            with anyio.move_on_after(1.0):
                await connection.invalidate()
