"""Membership: the servers that share one store, this one's row and heartbeat, and which of the others are alive.

Each server writes its heartbeat twice a second, by the store's clock, and reads all others'. A server that cannot read
heartbeats declares nobody dead, and after an outage of the database every server has the usual time to write again.
"""

import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from hashlib import blake2b

import anyio

from siderolink.common.errors import SideroLinkError
from siderolink.common.newest_dict import NewestDict
from siderolink.common.tasks import background_tasks
from siderolink.server.clock import Clock
from siderolink.server.store import FleetServer, Store, Transaction

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
DEAD_AFTER = 3.0
"""Seconds after its last heartbeat when the others declare a server dead. So a heartbeat may be late by 2.5 s."""
SURE_SECONDS = 2.5
"""Seconds after its heartbeat in which a server is certainly alive to the others and keeps its machines."""
FORGOTTEN_AFTER = 600.0
"""Seconds after which a dead server's row is removed."""
OUTAGE_SECONDS = DEAD_AFTER - HEARTBEAT_SECONDS
"""After this time without its own heartbeat, a server assumes that the database was unavailable. After a shorter time without
the database, the last heartbeats of the others are not older than `DEAD_AFTER` yet.
"""
MAX_CLOCK_OFFSET = 0.5
"""Maximum difference between a host's clock and the store's, in seconds."""
MAX_REMOVED = 256
"""Removed servers that are remembered, so that each is reported once although the feed may tell of it again."""
MAX_FAILED = 32
"""Maximum endpoints of failed servers reported to machines."""
_CLOSE_SECONDS = 1.0
_LATER_SECONDS = 0.05
"""Delay between the time when a server may be dead and the check of its heartbeat."""


async def _nothing() -> None:
    pass


def _weight(server_id: str, machine_id: str) -> bytes:
    """The weight of a server for a machine; the server with the highest one gets the machine (rendezvous hashing)."""
    return blake2b(f"{server_id} {machine_id}".encode(), digest_size=8).digest()


class Failures:
    """The endpoints of servers that died, were removed or may have failed, and have had no heartbeat since."""

    def __init__(self) -> None:
        self._heard_at: NewestDict[str, float] = NewestDict(MAX_FAILED)
        """The last heartbeats of the servers, by their endpoints."""

    def note(self, server: FleetServer) -> None:
        for endpoint in server.endpoints:
            self._heard_at.put(endpoint, server.heartbeat_at)

    def endpoints(self, living: Sequence[FleetServer]) -> list[str]:
        """Those of servers that are not alive again and were heard within `FORGOTTEN_AFTER`; the latest failure last."""
        for one in living:
            for endpoint in one.endpoints:
                if one.heartbeat_at > self._heard_at.get(endpoint, math.inf):
                    del self._heard_at[endpoint]
        now = max((one.heartbeat_at for one in living), default=0.0)
        return [endpoint for endpoint, heard_at in self._heard_at.items() if now - heard_at <= FORGOTTEN_AFTER]


class Membership:
    """One server among those of its store."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        server_id: str | None = None,
        endpoints: Iterable[str] = (),
        software: str = "",
        schema: int = 0,
        stamps_by_host: bool = False,
    ) -> None:
        """`server_id` defaults to a new one for each run of a server.

        `stamps_by_host`: the device takes its handshakes' timestamps from this host's clock, as the kernel's does.
        """
        self._stamps_by_host = stamps_by_host
        self._had_wrong_clock = False
        self.id = server_id or os.urandom(8).hex()
        self._store = store
        self._clock = clock
        self._row = FleetServer(
            id=self.id, endpoints=tuple(endpoints), heartbeat_at=clock.time(), software=software, schema=schema
        )
        self._others: dict[str, FleetServer] = {}
        self._dead: dict[str, None] = {}
        """Servers whose death was reported: those with a row, and the last `MAX_REMOVED` without one."""
        self.failures = Failures()
        self._read_at = clock.time()
        """When heartbeats were last read, on the store's clock."""
        self._beat_at = self._began_at = clock.monotonic()
        """When the last heartbeat was written, and when its writing began."""
        self.outage_ended_at = clock.time()
        """On the store's clock. A server knows nothing about the time before its start."""
        self._has_begun = False
        self._wake = anyio.Event()
        self._draining: set[str] = set()
        """Other servers whose drains were reported."""
        self.on_dead: Callable[[str], None] = lambda server_id: None
        """Called once with the id of each server that is dead or was removed."""
        self.on_failure: Callable[[], None] = lambda: None
        """Called when a server is dead, was removed or may have failed; machines should then check their links."""
        self.on_drained: Callable[[str], None] = lambda server_id: None
        """Called with the id of each other server that begins to drain."""
        self.on_standing: Callable[[str], None] = lambda server_id: None
        """Called with the id of each other server that is dead, drains, or no longer does."""
        self.on_return: Callable[[], Awaitable[None]] = _nothing
        """Awaited after others may have declared this server dead, before it relies on its ownership again."""
        self._was_doubtful = False
        self.on_beat: Callable[[float | None], None] = lambda seconds: None
        """Called at each heartbeat with the number of seconds for which no other server takes this one's machines; None if
        there is no other server."""

    # --- queries

    def get(self, server_id: str) -> FleetServer | None:
        return self._row if server_id == self.id else self._others.get(server_id)

    def is_alive(self, server_id: str) -> bool:
        """Whether the server had a recent heartbeat, as far as this one could read it."""
        server = self.get(server_id)
        if server is None or server is self._row:
            return server is not None
        return self._read_at - max(server.heartbeat_at, self.outage_ended_at) <= DEAD_AFTER

    def living(self) -> list[FleetServer]:
        """The servers that are alive, this one first."""
        return [self._row, *(one for _, one in sorted(self._others.items()) if self.is_alive(one.id))]

    @property
    def is_draining(self) -> bool:
        """Whether this server is draining."""
        return self._row.is_draining

    def is_leaving(self, server_id: str) -> bool:
        """Whether a live server is draining."""
        server = self.get(server_id)
        return server is not None and server.is_draining and self.is_alive(server_id)

    def everyone(self) -> list[FleetServer]:
        """All servers that were not removed, including silent ones, this one first."""
        return [self._row, *(one for _, one in sorted(self._others.items()))]

    def heartbeat_age(self, server: FleetServer) -> float:
        """Seconds since a server's last heartbeat, by the store's clock."""
        return max(0.0, self._clock.time() - server.heartbeat_at)

    @property
    def offline_for(self) -> float:
        """Seconds since the last heartbeat that was written."""
        return self._clock.monotonic() - self._beat_at

    @property
    def clock_offset(self) -> float:
        """This host's clock minus the store's, in seconds."""
        return self._clock.host_time() - self._clock.time()

    @property
    def has_wrong_clock(self) -> bool:
        """Whether machines dialled by other servers might refuse this one's handshakes as replays, or vice versa."""
        return self._stamps_by_host and abs(self.clock_offset) > MAX_CLOCK_OFFSET

    def endpoints(self, machine_id: str = "") -> list[str]:
        """The WireGuard endpoints of the live servers that are not draining: this server's own first, then those of the
        machine's `heir` without this server, and so on. So the machines of a dead server do not all go to one other server.

        The endpoints of a draining server come last in its own answers and are missing from those of others.
        """
        own, *others = self.living()
        others.sort(key=lambda one: _weight(one.id, machine_id), reverse=True)
        staying = [one for one in (own, *others) if not one.is_draining]
        found = [endpoint for one in staying + [own] for endpoint in one.endpoints]
        return list(dict.fromkeys(found))

    def heir(self, machine_id: str) -> str:
        """The server that dials a machine without a live owner; all servers that see the same members choose the same one."""
        living = self.living()
        staying = [one.id for one in living if not one.is_draining and abs(one.clock_offset) <= MAX_CLOCK_OFFSET]
        staying = staying or [one.id for one in living]
        return max(staying, key=lambda server_id: _weight(server_id, machine_id))

    # --- changes

    def describe(
        self,
        *,
        endpoints: Iterable[str] | None = None,
        peer_address: str | None = None,
        peer_fingerprint: str | None = None,
        is_draining: bool | None = None,
    ) -> None:
        """Change this server's row and write it at once. None leaves a value unchanged."""
        row = self._row
        self._row = replace(
            row,
            endpoints=row.endpoints if endpoints is None else tuple(endpoints),
            peer_address=row.peer_address if peer_address is None else peer_address,
            peer_fingerprint=row.peer_fingerprint if peer_fingerprint is None else peer_fingerprint,
            is_draining=row.is_draining if is_draining is None else is_draining,
        )
        self._wake.set()

    def changed(self, server: FleetServer, is_gone: bool) -> None:
        """Process a change of a server from the feed."""
        if server.id == self.id:
            return
        if is_gone:
            self.failures.note(self._others.pop(server.id, server))
        else:
            known = self._others.get(server.id)
            newest = server.heartbeat_at if known is None else max(known.heartbeat_at, server.heartbeat_at)
            self._others[server.id] = replace(server, heartbeat_at=newest)
        self._report_changes({server.id} if is_gone else set())

    def suspect(self, server_id: str) -> None:
        """Handle a hint that a server's process ended: machines check their links. It is dead only without heartbeats."""
        if server_id in self._others and server_id not in self._dead:
            log.warning("the server %s closed its connection and refuses another one: machines check their links", server_id)
            self.failures.note(self._others[server_id])
            self.on_failure()

    def _report_changes(self, gone: set[str]) -> None:
        dead = gone | {server_id for server_id in self._others if not self.is_alive(server_id)}
        told_dead = self._dead
        removed = [server_id for server_id in told_dead if server_id not in self._others]
        self._dead = dict.fromkeys((*removed, *dead))
        for server_id in dead - told_dead.keys():
            log.warning("the server %s is %s", server_id, "gone" if server_id in gone else "dead: it has no heartbeat")
            if server_id in self._others:
                self.failures.note(self._others[server_id])
            self.on_dead(server_id)
            self.on_failure()
        told, self._draining = self._draining, {server_id for server_id in self._others if self.is_leaving(server_id)}
        for server_id in self._draining - told:
            self.on_drained(server_id)
        for server_id in (self._draining ^ told) | (self._dead.keys() ^ told_dead.keys()):
            self.on_standing(server_id)
        for server_id in removed[:-MAX_REMOVED]:
            self._dead.pop(server_id, None)

    # --- run

    @property
    def pause(self) -> float:
        """Seconds until the next heartbeat, or until another server will be dead, so that its death is reported at once."""
        now = self._clock.time()
        heard = (max(one.heartbeat_at, self.outage_ended_at) for one in self._others.values() if self.is_alive(one.id))
        soonest = min((at + DEAD_AFTER - now for at in heard), default=HEARTBEAT_SECONDS)
        return min(HEARTBEAT_SECONDS, max(0.0, soonest) + _LATER_SECONDS)

    @asynccontextmanager
    async def joined(self) -> AsyncIterator[None]:
        """Read the other servers, and remove the row of this server's previous run. Raises StoreError.

        This server becomes a member with its first `beat`, when it is ready for machines, and leaves at the end of the context.
        """
        await self._write(puts=False)
        try:
            yield
        finally:
            await self.leave()

    async def run(self) -> None:
        """Write heartbeats until cancelled."""
        is_away = False
        while True:
            self._wake = anyio.Event()
            try:
                await self.beat()
                if is_away:
                    log.warning("heartbeats are written again")
                is_away = False
            except SideroLinkError as error:
                if not is_away:
                    log.warning("this server's heartbeat could not be written: %s", error)
                is_away = True
            with anyio.move_on_after(HEARTBEAT_SECONDS if is_away else self.pause):
                await self._wake.wait()

    async def beat(self) -> None:
        """Write this server's row and read the others'. Awaits `on_return` first if others may have declared this one dead.

        Raises StoreError.
        """
        await self._write()
        while self._was_doubtful:
            self._was_doubtful = False
            try:
                async with background_tasks() as tasks:
                    tasks.start_soon(self._keep_writing)
                    await self.on_return()
            except BaseException:
                self._was_doubtful = True
                raise
        self.on_beat(SURE_SECONDS - (self._clock.monotonic() - self._began_at) if self._others else None)

    async def _keep_writing(self) -> None:
        """Write heartbeats during `on_return`: with many machines, reading what others took takes longer than `DEAD_AFTER`."""
        while True:
            await anyio.sleep(HEARTBEAT_SECONDS)
            with suppress(SideroLinkError):
                await self._write()

    async def _write(self, *, puts: bool = True) -> None:
        self._watch_clock()
        self._began_at = self._clock.monotonic()
        row = self._row = replace(self._row, heartbeat_at=self._clock.time(), clock_offset=self.clock_offset)
        is_first = not self._has_begun
        was_away = self.offline_for > OUTAGE_SECONDS
        before = dict(self._others)

        async def work(transaction: Transaction) -> dict[str, FleetServer]:
            others = {one.id: one for one in await transaction.ownership.servers() if one.id != self.id}
            for one in list(others.values()):
                is_before = is_first and bool(row.endpoints) and one.endpoints == row.endpoints  # this server's previous run
                is_forgotten = row.heartbeat_at - one.heartbeat_at > FORGOTTEN_AFTER and not (was_away or is_first)
                if is_before or is_forgotten:
                    await transaction.ownership.delete_server(one.id)
                    del others[one.id]
            if puts:
                await transaction.ownership.put_server(row)
            return others

        others = await self._store.transact_urgently(work)
        self._has_begun |= puts
        now, at = self._clock.time(), self._clock.monotonic()
        if was_away:
            self.outage_ended_at = now
        self._was_doubtful |= not is_first and at - self._beat_at > SURE_SECONDS
        self._beat_at, self._read_at = at, now
        # what the feed told meanwhile is newer than what was read
        others |= {one.id: one for one in self._others.values() if before.get(one.id) is not one}
        others = {server_id: one for server_id, one in others.items() if server_id in self._others or server_id not in before}
        gone = self._others.keys() - others.keys()
        for server_id in gone:
            self.failures.note(self._others[server_id])
        self._others = others
        self._report_changes(gone)

    def _watch_clock(self) -> None:
        if self.has_wrong_clock is not self._had_wrong_clock:
            self._had_wrong_clock = not self._had_wrong_clock
            if self._had_wrong_clock:
                log.warning(
                    "this host's clock is %.1f s off the database's: this server dials no machine; synchronise it",
                    self.clock_offset,
                )
            else:
                log.warning("this host's clock is correct again")

    async def leave(self) -> None:
        """Remove this server's row within a second, even if this task was cancelled."""
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSE_SECONDS):
            try:
                await self._store.transact_urgently(lambda transaction: transaction.ownership.delete_server(self.id))
            except SideroLinkError as error:
                log.warning("this server's row could not be removed; the others will consider it dead: %s", error)
