"""A server that is replaced by a fresh one while `serve` runs, after its state was restored or its key changed."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import anyio

from siderolink.cli.logs import hide, log_event
from siderolink.cli.options import default_state
from siderolink.cli.secret import read_secret
from siderolink.common.errors import ConfigurationError, SideroLinkError, reason_of
from siderolink.common.tasks import background_tasks, in_thread, keep_running, to_its_end
from siderolink.server import EventStream, Server, Store
from siderolink.server.store import ServerKeyChanged
from siderolink.server.store.sealing import GivenKey, KeyFile, StateKey, parse_key
from siderolink.server.store.server_record import stored_key
from siderolink.server.store.sql import SqlStore

OnServer = Callable[[Server, EventStream], Awaitable[None]]
MakeServer = Callable[[Store | None], Server]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAddress:
    """The address of a database, and its credentials."""

    url: str
    """The URL without a password."""
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.url

    @asynccontextmanager
    async def open(self, *, alone: bool = False, key: StateKey | None = None) -> AsyncIterator[Store]:
        """Open the store. `alone`: only if no server uses it. `key` seals its secrets; None leaves them unsealed, see
        `key_of_database`.

        Raises ConfigurationError or StoreError.
        """
        try:
            from siderolink.server.store.sql.postgres import PostgresStore
        except ImportError as error:
            if error.name is None or not error.name.startswith("psycopg"):
                raise
            raise ConfigurationError("a store on Postgres needs more packages: pip install 'siderolink[postgres]'") from None
        opening = PostgresStore.open(self.url, password=self.password, alone=alone, key=key, unsealed_secrets=key is None)
        async with opening as store:
            yield store


def chosen_state(
    interface: str, state: Path | None, no_state: bool, url: str | None, password_file: Path | None
) -> Path | StoreAddress | None:
    """The store selected by the options; None keeps everything in memory. Raises ConfigurationError."""
    if url is not None:
        if state is not None or no_state:
            raise ConfigurationError("give only one of --store, --state and --no-state")
        return store_address(url, password_file)
    if password_file is not None:
        raise ConfigurationError("--store-password-file needs --store")
    return None if no_state else state or default_state(interface)


def store_address(url: str, password_file: Path | None) -> StoreAddress:
    """The address of a database, with its password. Raises ConfigurationError."""
    try:
        has_password = urlsplit(url).password is not None or "password=" in urlsplit(url).query
    except ValueError:
        has_password = False  # not a URL; opening it reports that
    if has_password:
        raise ConfigurationError(
            "a password in the store's URL is visible to every user of this host; give it by --store-password-file, "
            "by SIDEROLINK_STORE_PASSWORD, or by the systemd credential siderolink.store-password"
        )
    password = read_secret("store-password", os.environ.get("SIDEROLINK_STORE_PASSWORD"), password_file)
    hide(password)
    return StoreAddress(url=url, password=password)


def state_key(file: Path | None) -> StateKey | None:
    """The key in the given file, in SIDEROLINK_STATE_KEY or in the systemd credential siderolink.state-key; None for the
    default, a file beside a state file. Raises SideroLinkError.
    """
    if file is not None:
        return KeyFile(file)
    text = read_secret("state-key", os.environ.get("SIDEROLINK_STATE_KEY"), None)
    hide(text)
    return None if text is None else GivenKey(parse_key(text, "the state key that was given"), "the state key that was given")


def key_of_database(key: StateKey | None, *, unsealed_secrets: bool) -> StateKey | None:
    """The key of a database; None if its secrets stay readable. Raises ConfigurationError for neither or both."""
    if unsealed_secrets and key is not None:
        raise ConfigurationError("give a state key or --unsealed-secrets, not both")
    if key is None and not unsealed_secrets:
        raise ConfigurationError(
            "the secrets of a state in Postgres need a state key that all its servers share, and none was given: "
            "--state-key-file FILE creates one at the first start (copy that file to the other servers), and "
            "SIDEROLINK_STATE_KEY or the systemd credential siderolink.state-key provides one; --unsealed-secrets leaves "
            "the server's key and the join tokens readable in the database and in its dumps"
        )
    return key


def open_state(state: Path | StoreAddress, key: StateKey | None) -> AbstractAsyncContextManager[Store]:
    """Open a state that no server uses. Raises SideroLinkError."""
    return state.open(alone=True, key=key) if isinstance(state, StoreAddress) else SqlStore.open(state, key=key)


class Serving:
    """Runs servers one after the other on the same store: a state file, a database, or memory."""

    def __init__(
        self, make: MakeServer, state: Path | StoreAddress | None, on_server: OnServer, key: StateKey | None = None
    ) -> None:
        """`on_server` runs alongside each server and receives its events from the first one on.

        `key` seals the secrets of the state.
        """
        self.state = state
        self.key = key
        self._make = make
        self._on_server = on_server
        self._server: Server | None = None
        self._store: Store | None = None
        self._scope: anyio.CancelScope | None = None
        self._between: Callable[[], None] | None = None
        self._failure: OSError | None = None
        self._started = anyio.Event()
        self._taking_key = anyio.Lock()

    @property
    def is_running(self) -> bool:
        return self._server is not None

    @property
    def server(self) -> Server:
        """The running server. Raises SideroLinkError between two servers."""
        if self._server is None:
            raise SideroLinkError("the server is restarting")
        return self._server

    @property
    def store(self) -> Store | None:
        return self._store

    async def run(self) -> None:
        """Serve until cancelled. Raises SideroLinkError."""
        while True:
            await self._run_one()
            if self._between is not None:
                between, self._between = self._between, None
                try:
                    # the control socket, the page and the watchdog go on meanwhile
                    await to_its_end(in_thread(between))
                except OSError as error:
                    self._failure = error

    async def _run_one(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                if isinstance(self.state, StoreAddress):
                    self._store = await stack.enter_async_context(self.state.open(key=self.key))
                elif self.state is not None:
                    self._store = await stack.enter_async_context(SqlStore.open(self.state, key=self.key))
                server = self._make(self._store)
                events = server.events()
                await stack.enter_async_context(server)
                self._server = server
                with anyio.CancelScope() as self._scope:
                    self._started.set()
                    async with background_tasks() as tasks:
                        tasks.start_soon(keep_running, "following the server's key", self._follow_key)
                        await self._on_server(server, events)
                self._server = None
        finally:
            self._server = self._store = self._scope = None

    async def _follow_key(self) -> None:
        """Restart after another server of the store has replaced the common key. Raises SideroLinkError."""
        if self._store is None:
            return
        async with self._store.changes(lambda change: isinstance(change, ServerKeyChanged)) as changes:
            await self.take_stored_key()
            async for _ in changes:  # or changes were lost
                await self.take_stored_key()

    async def take_stored_key(self) -> Server:
        """Restart if the stored key differs from the running server's; returns the server with the stored key.

        Raises SideroLinkError.
        """
        async with self._taking_key:
            await self._started.wait()
            key = None if self._store is None else await stored_key(self._store)
            if key is None or key.public_key() == self.server.public_key:
                return self.server
            return await self.replace()

    async def replace(self, between: Callable[[], None] = lambda: None) -> Server:
        """Stop the server, call `between` while the state is closed, and return the next server once it runs.

        Raises SideroLinkError if `between` failed with an OSError; the next server runs in any case.
        """
        if self._scope is None:
            raise SideroLinkError("the server is restarting")
        self._between, self._started = between, anyio.Event()
        log_event("starting again", "the server's state was changed")
        self._scope.cancel()
        await self._started.wait()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise SideroLinkError(f"cannot replace the state: {reason_of(failure)}")
        return self.server
