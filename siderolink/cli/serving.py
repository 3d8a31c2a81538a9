"""A server that may be replaced by a fresh one while `serve` runs: after its state was restored, or its key changed."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio

from siderolink.cli.logs import say
from siderolink.common.errors import SideroLinkError
from siderolink.server import EventStream, Server, Store
from siderolink.server.store.sql import SqlStore

OnServer = Callable[[Server, EventStream], Awaitable[None]]
MakeServer = Callable[[Store | None], Server]


class Serving:
    """Runs servers, one after the other, each on the store in the state file; without one, on memory."""

    def __init__(self, make: MakeServer, state: Path | None, on_server: OnServer) -> None:
        """`on_server` is run beside each server while that lives, and is given its events from the very first."""
        self.state = state
        self._make = make
        self._on_server = on_server
        self._server: Server | None = None
        self._store: SqlStore | None = None
        self._scope: anyio.CancelScope | None = None
        self._between: Callable[[], None] | None = None
        self._failure: OSError | None = None
        self._started = anyio.Event()

    @property
    def is_running(self) -> bool:
        return self._server is not None

    @property
    def server(self) -> Server:
        """Raises SideroLinkError in the moment between two servers."""
        if self._server is None:
            raise SideroLinkError("the server is being started again")
        return self._server

    @property
    def store(self) -> SqlStore | None:
        return self._store

    async def run(self) -> None:
        """Serve until cancelled. Raises SideroLinkError."""
        while True:
            await self._run_one()
            if self._between is not None:
                between, self._between = self._between, None
                try:
                    between()
                except OSError as error:
                    self._failure = error

    async def _run_one(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                if self.state is not None:
                    self._store = await stack.enter_async_context(SqlStore.open(self.state))
                server = self._make(self._store)
                events = server.events()
                await stack.enter_async_context(server)
                self._server = server
                with anyio.CancelScope() as self._scope:
                    self._started.set()
                    await self._on_server(server, events)
                self._server = None
        finally:
            self._server = self._store = self._scope = None

    async def replace(self, between: Callable[[], None] = lambda: None) -> Server:
        """Stop the server, call `between` while nothing has the state open, and return the next server once it runs.

        Raises SideroLinkError where `between` failed with an OSError; the next server runs all the same.
        """
        if self._scope is None:
            raise SideroLinkError("the server is being started again")
        self._between, self._started = between, anyio.Event()
        say("starting again", "the server's state was changed")
        self._scope.cancel()
        await self._started.wait()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise SideroLinkError(f"the state could not be replaced: {failure.strerror}")
        return self.server
