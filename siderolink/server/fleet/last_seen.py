"""Lazily stored notes: where and when machines were last seen, and the highest timestamp of handshakes.

They are written a few seconds after a change and when the server stops, so that traffic costs the store almost nothing. After
a start, timestamps begin above all that may have been used without being written.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import anyio

from siderolink.common.errors import StoreError
from siderolink.server.store import LastSeen, Store, Transaction
from siderolink.server.store.server_record import WRITE_AFTER

if TYPE_CHECKING:
    from siderolink.server.fleet.owners import Owners

log = logging.getLogger(__name__)

_AT_ONCE = 512
_CLOSE_SECONDS = 1.0


class Stamps(Protocol):
    """The source of the TAI64N high-water mark."""

    @property
    def high_water(self) -> bytes: ...


class LastSeenNotes:
    """Collects when machines were last seen, by id."""

    def __init__(self, store: Store, stamps: Stamps | None = None, *, write_after: float = WRITE_AFTER) -> None:
        self._store = store
        self._stamps = stamps
        self._written_mark = b"" if stamps is None else stamps.high_water
        self._write_after = write_after
        self._waiting: dict[str, LastSeen] = {}
        self._wake = anyio.Event()
        self.owners: Owners | None = None
        """Set if several servers share the store, where only a link's owner writes its notes."""

    def add(self, machine_id: str, seen: LastSeen) -> None:
        """Called between packets: fast, and never raises."""
        before = self._waiting.get(machine_id)
        self._waiting[machine_id] = seen if before is None else seen.after(before)
        self._wake.set()

    async def run(self) -> None:
        """Write notes as they arrive, until cancelled."""
        while True:
            await self._wake.wait()
            await anyio.sleep(self._write_after)
            self._wake = anyio.Event()
            await self.write()

    async def write(self) -> None:
        """Write the waiting notes. On failure they wait on: one note per machine, so that memory stays bounded."""
        batch: dict[str, LastSeen] = {}
        try:
            while self._waiting:
                ids = list(islice(self._waiting, _AT_ONCE))
                batch = {machine_id: self._waiting.pop(machine_id) for machine_id in ids}
                # Only a link's owner writes, and a note that is older than the stored one changes nothing (LastSeen.of): late
                # writers are harmless.
                await self._write(batch)
                batch = {}
            await self._write_mark()
        except StoreError as error:
            for machine_id, seen in batch.items():
                newer = self._waiting.get(machine_id)
                self._waiting[machine_id] = seen if newer is None else newer.after(seen)
            self._wake.set()
            log.warning("last-seen times and endpoints could not be stored: %s", error)

    async def _write(self, batch: Mapping[str, LastSeen]) -> None:
        owners = self.owners
        if owners is None:
            await self._store.transact(lambda transaction: transaction.note(batch, self._store.time()))
        else:
            owners.keep(await self._store.transact(lambda transaction: owners.note(transaction, batch)))

    async def _write_mark(self) -> None:
        mark = b"" if self._stamps is None else self._stamps.high_water
        if mark == self._written_mark:
            return

        async def work(transaction: Transaction) -> None:
            record = await transaction.server()
            if record is not None and record.timestamp_mark < mark:
                await transaction.set_server(replace(record, timestamp_mark=mark))

        await self._store.transact(work)
        self._written_mark = mark

    async def aclose(self) -> None:
        """Write queued entries for at most a second, even if this task was cancelled."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_SECONDS):
            await self.write()
