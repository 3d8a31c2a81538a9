"""What the works of one batch read: all that is asked for at the same time goes into one query."""

import asyncio
from collections.abc import Hashable, Iterable, Sequence

import aiosqlite

from siderolink.common.errors import StoreError
from siderolink.server.store.base import Machine, ServerRecord
from siderolink.server.store.sql import statements
from siderolink.server.store.sql.failures import translated

Key = tuple[str, Hashable]
"""What was read or written: a column of the machines and its value, or BAN and a UUID, or SERVER."""

BAN = "ban"
SERVER: Key = ("server", 1)

Found = Machine | ServerRecord | bool | None


class Reader:
    """Reads rows of one database transaction, each at most once; the works of a batch share it."""

    def __init__(self, driver: aiosqlite.Connection) -> None:
        self._driver = driver
        self._answers: dict[Key, asyncio.Future[Found]] = {}
        self._wanted: list[Key] = []
        self._wake = asyncio.Event()

    def want(self, keys: Iterable[Key]) -> None:
        """Ask for what is soon read."""
        for key in keys:
            if key not in self._answers:
                self._answers[key] = asyncio.get_running_loop().create_future()
                self._wanted.append(key)
                self._wake.set()

    async def read(self, key: Key) -> Found:
        """Raises StoreError."""
        self.want((key,))
        return await self._answers[key]

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(0)  # other works of the batch are about to ask, too
            self._wake.clear()
            wanted, self._wanted = self._wanted, []
            try:
                with translated():
                    found = await self._fetch(wanted)
            except StoreError as error:
                for key in wanted:
                    self._answers[key].set_exception(error)
                    self._answers[key].exception()  # nobody may have waited
            else:
                self._answer(wanted, found)

    def _answer(self, wanted: Sequence[Key], found: dict[Key, Found]) -> None:
        for key in wanted:
            machine = found.get(key)
            self._answers[key].set_result(machine)
            if isinstance(machine, Machine):
                by_id = self._answers.setdefault(("id", machine.id), asyncio.get_running_loop().create_future())
                if not by_id.done() and ("id", machine.id) not in wanted:
                    by_id.set_result(machine)

    async def _fetch(self, wanted: Sequence[Key]) -> dict[Key, Found]:
        found: dict[Key, Found] = {}
        by_column: dict[str, list[Hashable]] = {}
        for column, value in wanted:
            by_column.setdefault(column, []).append(value)
        banned = by_column.pop(BAN, None)
        if banned is not None:
            found |= {(BAN, node_uuid): True for node_uuid in await statements.find_bans(self._driver, banned)}
        if by_column.pop(SERVER[0], None) is not None:
            found[SERVER] = await statements.find_server(self._driver)
        if by_column:
            for machine in await statements.find_machines(self._driver, by_column):
                found |= {(name, getattr(machine, name)): machine for name in by_column}
        return found
