"""A relay to a database for one of several servers; a test can cut, silence and reopen it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from anyio.from_thread import BlockingPortal, start_blocking_portal

Target = Path | tuple[str, int]
"""Postgres's Unix socket, or a port of this host."""


class DatabaseRelay:
    """Listens on a Postgres socket path in a folder, and relays connections."""

    def __init__(self, folder: Path, target: Target, portal: BlockingPortal) -> None:
        self.folder = folder
        self._target = target
        self._portal = portal
        self._writers: set[asyncio.StreamWriter] = set()
        self._passes = asyncio.Event()
        self._is_open = True
        self._passes.set()

    def url(self, database: str) -> str:
        return f"postgresql://siderolink@/{database}?host={self.folder}&port=5432"

    def cut(self) -> None:
        """Reset all connections, and close new ones at once."""
        self._portal.call(self._cut)

    def silence(self) -> None:
        """Stop relaying silently; connections stay open."""
        self._portal.call(self._passes.clear)

    def open(self) -> None:
        """Relay again, with the data that was held back."""
        self._portal.call(self._open)

    def _open(self) -> None:
        self._is_open = True
        self._passes.set()

    def _cut(self) -> None:
        self._is_open = False
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        self._cut()
        self._passes.set()
        while self._writers:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)  # closed transports get their last callback

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await self._passes.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._is_open:
            writer.transport.abort()
            return
        self._writers.add(writer)
        await self._passes.wait()
        on = None
        try:
            if isinstance(self._target, Path):
                there, on = await asyncio.open_unix_connection(self._target)
            else:
                there, on = await asyncio.open_connection(*self._target)
            self._writers.add(on)
            await asyncio.gather(self._carry(reader, on), self._carry(there, writer))
        except OSError:
            writer.transport.abort()
        finally:
            self._writers -= {writer, on}


@contextmanager
def database_relay(folder: Path, target: Target) -> Iterator[DatabaseRelay]:
    folder.mkdir()

    @asynccontextmanager
    async def listening(made: DatabaseRelay) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(made.serve, folder / ".s.PGSQL.5432")
        yield
        server.close()
        await made.close()

    with start_blocking_portal("asyncio") as portal:
        made = DatabaseRelay(folder, target, portal)
        with portal.wrap_async_context_manager(listening(made)):
            yield made
