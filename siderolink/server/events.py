"""What happens on a server, for an embedder to iterate over."""

from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Self
from weakref import WeakSet

import anyio

from siderolink.server.refusals import JoinRefusal
from siderolink.server.store import Machine

DEFAULT_EVENT_LIMIT = 1024


class LeaveReason(StrEnum):
    """Why a machine is no longer known."""

    REMOVED = "removed"
    BANNED = "banned"
    NO_HANDSHAKE = "no handshake"
    """It joined and never completed a WireGuard handshake."""
    REMOVED_ELSEWHERE = "removed elsewhere"
    """Another server with the same store removed or banned it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineJoined:
    """A Provision call was answered that made a new link; a repeated call within one link makes no event."""

    machine: Machine
    is_new: bool
    """True where the machine was not known before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeCompleted:
    """A WireGuard session with the machine was made or renewed."""

    machine: Machine
    is_first: bool
    """True where it brings the link up: the first since the join or since LinkDown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDown:
    """Nothing authenticated has come from the machine for too long. The link may come up again by itself."""

    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLeft:
    """The machine is forgotten: its peer, its addresses and its streams are gone."""

    machine: Machine
    reason: LeaveReason


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRefused:
    """A Provision call was refused."""

    reason: JoinRefusal
    node_uuid: str | None
    """The UUID that was claimed, where it was well-formed."""
    source: str
    """Where the call came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost:
    """This reader was too slow; the oldest `count` events were dropped."""

    count: int


ServerEvent = MachineJoined | HandshakeCompleted | LinkDown | MachineLeft | JoinRefused | EventsLost


class EventStream(AsyncIterator[ServerEvent]):
    """The events published since it was made; ends when the server does. Bounded: the oldest give way, and that is said."""

    def __init__(self, limit: int) -> None:
        self._waiting: deque[ServerEvent] = deque()
        self._limit = limit
        self._lost = 0
        self._ready = anyio.Event()
        self._ended = False

    def add(self, event: ServerEvent) -> None:
        if len(self._waiting) >= self._limit:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._ready.set()

    def end(self) -> None:
        """Let the reader finish what waits, then stop."""
        self._ended = True
        self._ready.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ServerEvent:
        while True:
            if self._lost:
                lost, self._lost = self._lost, 0
                return EventsLost(count=lost)
            if self._waiting:
                return self._waiting.popleft()
            if self._ended:
                raise StopAsyncIteration
            self._ready = anyio.Event()
            await self._ready.wait()


class EventHub:
    """Hands each event to every stream that someone still holds."""

    def __init__(self) -> None:
        self._streams: WeakSet[EventStream] = WeakSet()
        self.counts: Counter[str] = Counter()
        """How often each kind of event was published, by class name."""
        self._ended = False

    def subscribe(self, limit: int = DEFAULT_EVENT_LIMIT) -> EventStream:
        stream = EventStream(limit)
        if self._ended:
            stream.end()
        else:
            self._streams.add(stream)
        return stream

    def publish(self, event: ServerEvent) -> None:
        self.counts[type(event).__name__] += 1
        for stream in self._streams:
            stream.add(event)

    def end(self) -> None:
        self._ended = True
        for stream in list(self._streams):
            stream.end()
        self._streams.clear()
