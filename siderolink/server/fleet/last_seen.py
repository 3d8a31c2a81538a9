"""What is remembered lazily: where and when machines were last heard, and how far the handshakes' timestamps have come.

Written a few seconds after it changed and when the server stops, so that traffic costs the store next to nothing. Timestamps
begin further on after a start than they can have come unwritten.
"""

import logging
from dataclasses import replace
from typing import Protocol

import anyio

from siderolink.common.errors import ConfigurationError, StoreError
from siderolink.common.hostport import HostPort
from siderolink.common.wireguard.path import Path
from siderolink.server.store import Sighting, Store, Transaction

log = logging.getLogger(__name__)

WRITE_AFTER = 5.0
"""Seconds from a change to its writing."""
_AT_ONCE = 512
_CLOSE_SECONDS = 1.0


class Stamps(Protocol):
    """Where the TAI64N mark is read from."""

    @property
    def high_water(self) -> bytes: ...


def udp_endpoint(path: Path | None) -> str | None:
    """Where a path leads by UDP, as host:port; None for a tunnel or for no path."""
    text = str(path) if path is not None else ""
    try:
        return str(HostPort.parse(text))
    except ConfigurationError:
        return None


class Sightings:
    """Collects sightings by machine id."""

    def __init__(self, store: Store, stamps: Stamps | None = None, *, write_after: float = WRITE_AFTER) -> None:
        self._store = store
        self._stamps = stamps
        self._written_mark = b"" if stamps is None else stamps.high_water
        self._write_after = write_after
        self._waiting: dict[str, Sighting] = {}
        self._wake = anyio.Event()

    def add(self, machine_id: str, sighting: Sighting) -> None:
        """Called between packets: quick, and never raises."""
        before = self._waiting.get(machine_id)
        if before is not None and sighting.handshake_at is None and before.handshake_at is not None:
            sighting = Sighting(endpoint=sighting.endpoint, seen_at=sighting.seen_at, handshake_at=before.handshake_at)
        self._waiting[machine_id] = sighting
        self._wake.set()

    async def run(self) -> None:
        """Write what comes, for ever."""
        while True:
            await self._wake.wait()
            await anyio.sleep(self._write_after)
            self._wake = anyio.Event()
            await self.write()

    async def write(self) -> None:
        """Write what waits. What cannot be written is given up: it is not worth a link."""
        try:
            while self._waiting:
                ids = list(self._waiting)[:_AT_ONCE]
                batch = {machine_id: self._waiting.pop(machine_id) for machine_id in ids}
                await self._store.transact(lambda transaction, batch=batch: transaction.note(batch))  # type: ignore[misc]
            await self._write_mark()
        except StoreError as error:
            log.warning("where machines were last heard could not be remembered: %s", error)

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
        """Write what waits, within a second, also when this task was cancelled."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_SECONDS):
            await self.write()
