"""The history: the events of machines in the last days, kept in the store.

publish()  ->  a queue: never blocks  ->  occurrences, identical ones counted  ->  entries in the store, every few seconds

So neither a join nor a packet waits for it. While the store does not accept writes, entries wait up to a limit; those beyond
are only counted. Occurrences are plain tuples because there is one per join; they become entries when they are written.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.addressing import format_address
from siderolink.common.errors import ConfigurationError, StoreError
from siderolink.common.grpc.sources import plain
from siderolink.common.tasks import background_tasks, uninterrupted
from siderolink.common.text import one_line, shared
from siderolink.server.clock import RetentionTime
from siderolink.server.events import (
    AdmissionChanged,
    ClaimRefused,
    EventsLost,
    EventStream,
    HandshakeCompleted,
    JoinRefused,
    LimitOver,
    LimitReached,
    LinkDown,
    MachineJoined,
    MachineLeft,
    MachineRekeyed,
    ServerEvent,
    UniqueTokenBound,
)
from siderolink.server.store import HistoryBounds, HistoryEntry, HistoryKind, HistoryQuery, Machine, Store, Transaction
from siderolink.server.store.history import NO_MACHINE
from siderolink.server.store.tokens import GIVEN_TOKEN, TokenColumn

log = logging.getLogger(__name__)

QUEUE_LIMIT = 65_536
"""Events that may wait to be recorded; when all machines join at once there are three for each."""
_AT_ONCE = 500
_CLOSE_SECONDS = 1.0
_DIGEST_BYTES = 6
_TEXT_LIMIT = 256
_TOKENS = 10_000
_GATHER_SECONDS = 0.1
"""How long events are gathered before they are recorded together."""

FindMachine = Callable[[str], Awaitable[Machine | None]]
"""Finds a machine by name, id, UUID or public key; None if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryOptions:
    """Retention and write intervals of the history."""

    max_age: float = 30 * 86_400.0
    """Seconds."""
    per_machine: int = 500
    """Maximum entries per machine; the newest are kept. Refused joins share a bound ten times as large."""
    total: int = 200_000
    """Maximum entries of all machines; one takes about 250 bytes."""
    write_after: float = 2.0
    """Seconds until an entry is written; repetitions until then are counted in one entry."""
    write_refusals_after: float = 60.0
    """The same for refused joins, which strangers can cause in large numbers."""
    max_waiting: int = 20_000
    """Maximum entries that wait while the store does not answer."""
    max_refusals: int = 1000
    """Different refused joins recorded individually within `write_refusals_after`; further ones are only counted."""
    prune_every: float = 600.0
    """Seconds."""
    prune_after: int = 10_000
    """Number of new entries after which pruning does not wait for `prune_every`."""

    def __post_init__(self) -> None:
        for name in ("max_age", "per_machine", "total", "max_waiting", "max_refusals"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} of the history must be at least 1, not {getattr(self, name)}")


DEFAULT_HISTORY = HistoryOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryCounters:
    """Entries since the server started."""

    written: int
    lost: int
    """Entries dropped because too many waited for the store, and events that were not recorded in time."""
    waiting: int
    failures: int
    """Failed writes."""
    pruned: int
    """Entries deleted because they were too old or too many."""


class _Known(NamedTuple):
    """The data of a machine's last handshake and last join; empty if unknown."""

    source: str = ""
    transport: str = ""
    version: str = ""


_UNKNOWN = _Known()


@lru_cache(maxsize=256)
def _shared_known(source: str, transport: str, version: str) -> _Known:
    """One object for all machines that joined and were not heard so far, as after a restart."""
    return _Known(source, transport, version)


class _Happening(NamedTuple):
    """An entry without its time, so that repetitions are equal."""

    machine_id: str
    node_uuid: str
    kind: HistoryKind
    detail: str = ""
    transport: str = ""
    source: str = ""
    version: str = ""
    token_digits: str = ""
    """The first digits of the join token's digest."""


_Counted = tuple[_Happening, float, int]
"""An occurrence, its first time, and its number of repetitions."""


class _Waiting:
    """Occurrences to be written; repetitions are counted."""

    def __init__(self, limit: int) -> None:
        self._found: dict[_Happening, tuple[float, int]] = {}
        """The first time and the count."""
        self._limit = limit

    def __len__(self) -> int:
        return len(self._found)

    def add(self, happening: _Happening, at: float, count: int = 1) -> bool:
        """Returns False if the limit is reached."""
        known = self._found.get(happening)
        if known is not None:
            at, count = min(at, known[0]), count + known[1]
        elif len(self._found) >= self._limit:
            return False
        self._found[happening] = at, count
        return True

    def take(self, most: int) -> list[_Counted]:
        return [(happening, *self._found.pop(happening)) for happening in list(islice(self._found, most))]


def _change_of(event: UniqueTokenBound | AdmissionChanged | LimitReached | LimitOver) -> tuple[HistoryKind, str, str]:
    """Kind, detail and source of the entry for an event that does not change the link."""
    match event:
        case UniqueTokenBound(source=source):
            return HistoryKind.BOUND, "its unique token", source or ""
        case AdmissionChanged(machine=machine):
            return HistoryKind.ADMISSION, str(machine.admission), ""
        case LimitReached(limit=limit):
            return HistoryKind.LIMITED, limit, ""
        case LimitOver(limit=limit):
            return HistoryKind.LIMIT_OVER, f"{limit}: {event.dropped} dropped in {event.seconds:.0f} s", ""


async def _pass_waiting(events: EventStream, note: Callable[[ServerEvent], None]) -> None:
    """Pass on all waiting events. Yields to other tasks."""
    while part := events.take_waiting(_AT_ONCE):
        for event in part:
            note(event)
        await checkpoint()


class History:
    """Records events of machines, and answers queries about them."""

    def __init__(self, store: Store, find: FindMachine, options: HistoryOptions, events: EventStream) -> None:
        self._store = store
        self._events = events
        self._find = find
        self._options = options
        self._known: dict[str, _Known] = {}
        self._retention_time = RetentionTime("history entries", lambda: store.time())
        self._waiting = _Waiting(options.max_waiting)
        self._refusals = _Waiting(options.max_refusals)
        self._refusals_not_noted = 0
        self._is_failing = False
        self._wake, self._grown = anyio.Event(), anyio.Event()
        self._written_since_pruned = 0
        self._token_ids: dict[str, str] = {}
        """Ids of stored tokens by the first digits of the presented token's digest."""
        self._token_names: dict[str, str] = {}
        self._written = self._lost = self._failures = self._pruned = 0

    # --- queries

    async def entries(
        self,
        machine: str | None = None,
        *,
        kinds: Sequence[HistoryKind] = (),
        since: float | None = None,
        until: float | None = None,
        before_seq: int | None = None,
        after_seq: int | None = None,
        limit: int = 1000,
    ) -> Sequence[HistoryEntry]:
        """The history of one machine or of all: newest entries first; with `after_seq` oldest first.

        `machine` is an id, UUID or public key; for a removed machine its id or UUID. Raises StoreError.
        """
        await self.write()
        query = HistoryQuery(
            kinds=kinds, since=since, until=until, before_seq=before_seq, after_seq=after_seq, limit=max(1, min(limit, 1000))
        )
        return await self._store.history(query if machine is None else await self._of(machine, query))

    async def delete(self, machine: str | None, *, until: float | None = None) -> int:
        """Delete entries of one machine (known or removed) or of all, up to a time; returns their number.

        Raises StoreError.
        """
        await self.write()
        query = HistoryQuery(until=until)
        return await self._store.delete_history(query if machine is None else await self._of(machine, query))

    async def _of(self, name: str, query: HistoryQuery) -> HistoryQuery:
        """The query for one machine: its row's entries and those under its UUID."""
        machine = await self._find(name)
        if machine is not None:
            return replace(query, machine_id=machine.id, node_uuid=machine.node_uuid)
        return replace(query, machine_id=name or None, node_uuid=name.lower())

    @property
    def options(self) -> HistoryOptions:
        """The amount of history kept."""
        return self._options

    def counters(self) -> HistoryCounters:
        return HistoryCounters(
            written=self._written,
            lost=self._lost,
            waiting=len(self._waiting) + len(self._refusals),
            failures=self._failures,
            pruned=self._pruned,
        )

    # --- recording

    async def know(self, parts: Iterable[Iterable[Machine]]) -> None:
        """Take the rows at the start, part by part, as the state with which later events are compared."""
        for part in parts:
            for machine in part:
                transport = "udp" if machine.last_endpoint else "tunnel" if machine.last_source else ""
                known = _shared_known(plain(machine.last_source or ""), transport, machine.talos_version)
                self._known.setdefault(machine.id, known)
            await checkpoint()

    async def run(self) -> None:
        """Record events and write them, until cancelled."""
        async with background_tasks() as tasks:
            tasks.start_soon(self._write_often)
            tasks.start_soon(self._prune_often)
            while await self._events.wait():
                await anyio.sleep(min(_GATHER_SECONDS, self._options.write_after))
                await _pass_waiting(self._events, self.note)

    def note(self, event: ServerEvent) -> None:
        """Queue an event's entries; most handshakes have none. Never blocks."""
        match event:
            case MachineJoined() | HandshakeCompleted():
                self._note_link(event)
            case LinkDown(machine=machine, reason=reason):
                self._add(machine, HistoryKind.DOWN, str(reason))
            case MachineLeft(machine=machine, reason=reason):
                self._known.pop(machine.id, None)
                self._add(machine, HistoryKind.LEFT, str(reason))
            case JoinRefused():
                self._refused(event)
            case MachineRekeyed(machine=machine, basis=basis, source=source, old_source=old_source):
                detail = f"{basis}; before from {old_source or 'nowhere'}"
                self._add(machine, HistoryKind.TAKEN_OVER, detail, source=source or "")
            case ClaimRefused(machine=machine, source=source, known_source=known_source):
                self._add(
                    machine, HistoryKind.CLAIM_REFUSED, f"the machine is at {known_source or 'no address'}", source=source
                )
            case UniqueTokenBound() | AdmissionChanged() | LimitReached() | LimitOver():
                kind, detail, source = _change_of(event)
                self._add(event.machine, kind, detail, source=source)
            case EventsLost(count=count):
                self._lost += count
                self._queue(_Happening(NO_MACHINE, "", HistoryKind.LOST, f"{count} events were not noted"))

    def _note_link(self, event: MachineJoined | HandshakeCompleted) -> None:
        machine = event.machine
        known = self._known.get(machine.id, _UNKNOWN)
        if isinstance(event, MachineJoined):
            if known.version and machine.talos_version != known.version:
                self._add(machine, HistoryKind.VERSION, f"{machine.talos_version or 'none'}, before {known.version}")
            self._known[machine.id] = _shared_known(known.source, known.transport, machine.talos_version)
            detail = f"{'new' if event.is_new else 'known'} machine at {format_address(machine.overlay_address)}"
            self._add(machine, HistoryKind.JOINED, detail, transport="tunnel" if machine.tunnel else "udp")
            return
        transport, source = "tunnel" if event.is_tunnel else "udp", event.source or ""
        if source and known.source and source != known.source:
            detail = f"{source}, before {known.source}"
            self._add(machine, HistoryKind.ADDRESS, detail, source=source, transport=transport)
        if source and known.transport and transport != known.transport:
            detail = f"{transport}, before {known.transport}"
            self._add(machine, HistoryKind.TRANSPORT, detail, source=source, transport=transport)
        if source and (source, transport) != known[:2]:
            self._known[machine.id] = _shared_known(source, transport, known.version)
        if event.is_first:
            self._add(machine, HistoryKind.UP, str(machine.overlay_address), source=source, transport=transport)

    def _refused(self, event: JoinRefused) -> None:
        known = f"; the machine is at {event.known_source}" if event.known_source else ""
        happening = _Happening(
            NO_MACHINE,
            event.node_uuid or "",
            HistoryKind.REFUSED,
            one_line(f"{event.reason}{known}", limit=_TEXT_LIMIT),
            source=one_line(event.source, limit=_TEXT_LIMIT),
        )
        if not self._refusals.add(happening, self._store.time()):
            self._refusals_not_noted += 1
        self._wake.set()

    def _add(self, machine: Machine, kind: HistoryKind, detail: str = "", *, source: str = "", transport: str = "") -> None:
        happening = _Happening(
            machine.id,
            machine.node_uuid,
            kind,
            one_line(detail, limit=_TEXT_LIMIT),
            transport,
            one_line(source, limit=_TEXT_LIMIT) if source else "",
            machine.talos_version,
            self._token_digits(machine),
        )
        self._queue(happening)

    def _token_digits(self, machine: Machine) -> str:
        """The first digits of the join token's digest. Also remembers the token's id, to write its current name later."""
        if machine.join_token_digest is None:
            return ""
        digits = machine.join_token_digest[:_DIGEST_BYTES].hex()
        if machine.token_id is not None:
            if len(self._token_ids) >= _TOKENS:
                self._token_ids.clear()
                self._token_names.clear()
            self._token_ids[digits] = machine.token_id
        return digits

    def _queue(self, happening: _Happening, at: float | None = None, count: int = 1) -> None:
        if not self._waiting.add(happening, self._store.time() if at is None else at, count):
            self._lost += 1
        self._wake.set()

    # --- writing

    async def _write_often(self) -> None:
        refusals_at = anyio.current_time() + self._options.write_refusals_after
        while True:
            await self._wake.wait()
            await anyio.sleep(self._options.write_after)
            self._wake = anyio.Event()
            if anyio.current_time() >= refusals_at:
                self._move_refusals()
                refusals_at = anyio.current_time() + self._options.write_refusals_after
            await self._write_or_warn()
            if len(self._waiting) or len(self._refusals):
                self._wake.set()

    async def _write_or_warn(self) -> None:
        try:
            await self._write_waiting()
        except StoreError as error:
            self._failures += 1
            if not self._is_failing:
                log.warning("cannot store the history, retrying: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False

    def _move_refusals(self) -> None:
        for counted in self._refusals.take(len(self._refusals)):
            self._queue(*counted)
        count, self._refusals_not_noted = self._refusals_not_noted, 0
        if count:
            self._queue(_Happening(NO_MACHINE, "", HistoryKind.LOST, "more joins were refused; this counts them"), count=count)

    @uninterrupted
    async def write(self) -> None:
        """Write queued entries. Raises StoreError; unwritten entries stay queued."""
        await _pass_waiting(self._events, self.note)
        self._move_refusals()
        await self._write_waiting()

    async def _write_waiting(self) -> None:
        while batch := self._waiting.take(_AT_ONCE):
            try:
                await self._store.transact(lambda transaction, batch=batch: self._add_to(transaction, batch))  # type: ignore[misc]
            except BaseException:
                for counted in batch:
                    self._queue(*counted)
                raise
            self._written += len(batch)
            self._written_since_pruned += len(batch)
            if self._written_since_pruned >= self._options.prune_after:
                self._grown.set()

    async def _add_to(self, transaction: Transaction, batch: Sequence[_Counted]) -> None:
        """Add entries with the current names of their join tokens."""
        for digits in {happening.token_digits for happening, _, _ in batch} & self._token_ids.keys():
            token_id = self._token_ids[digits]
            if token_id not in self._token_names:
                found = await transaction.tokens.find(TokenColumn.ID, token_id)
                self._token_names[token_id] = token_id if found is None else found.name
        await transaction.add_history([self._entry(*counted) for counted in batch])

    def _entry(self, happening: _Happening, at: float, count: int) -> HistoryEntry:
        machine_id, node_uuid, kind, detail, transport, source, version, digits = happening
        return HistoryEntry(
            at=at,
            machine_id=machine_id,
            node_uuid=node_uuid,
            kind=kind,
            detail=detail,
            transport=transport,
            source=source,
            version=version,
            join_token=self._token_name(digits) if digits else "",
            count=count,
        )

    def _token_name(self, digits: str) -> str:
        token_id = self._token_ids.get(digits, GIVEN_TOKEN)
        return shared(f"{self._token_names.get(token_id, token_id)} ({digits})")  # most machines have the same

    async def _prune_often(self) -> None:
        while True:
            self._grown = anyio.Event()
            with anyio.move_on_after(self._options.prune_every):
                await self._grown.wait()
            self._written_since_pruned = 0
            self._token_names.clear()  # tokens may have been renamed
            try:
                await self.prune()
            except StoreError as error:
                log.warning("cannot delete old history entries, retrying: %s", error)

    async def prune(self) -> None:
        """Delete entries that are too old or too many. Raises StoreError."""
        options = self._options
        since = self._retention_time() - options.max_age
        bounds = HistoryBounds(since=since, per_machine=options.per_machine, total=options.total)
        self._pruned += await self._store.prune_history(bounds)

    async def aclose(self) -> None:
        """Write queued entries, for at most a second, even if this task was cancelled."""
        with anyio.CancelScope(shield=True):
            await _pass_waiting(self._events, self.note)
            self._move_refusals()
            with anyio.move_on_after(_CLOSE_SECONDS):
                await self._write_or_warn()
