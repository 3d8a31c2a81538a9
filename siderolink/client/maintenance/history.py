"""Bounded history: the machine's last events, and the last lines of this program's log."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

import anyio

from siderolink.client.maintenance.host.proc import masked
from siderolink.client.reporting.event_sender import IdMaker
from siderolink.common.machine_events import MachineEventPayload, pack_event
from siderolink.common.pb.machine import Event, EventsRequest

T = TypeVar("T")

MAX_EVENTS = 256
MAX_LINES = 1024
MAX_BYTES = 256 * 1024
_LONGEST_LINE = 4096


class RingBuffer(Generic[T]):
    """A ring buffer that any number of readers follow. Slow readers miss entries."""

    def __init__(self, max_items: int, max_bytes: int) -> None:
        self._entries: deque[tuple[T, int]] = deque()
        self._max_items, self._max_bytes = max_items, max_bytes
        self._size = 0
        self._first = 0
        self._grown = anyio.Event()

    @property
    def end(self) -> int:
        """The number of the next entry."""
        return self._first + len(self._entries)

    def append(self, entry: T, size: int) -> None:
        self._entries.append((entry, size))
        self._size += size
        while self._entries and (len(self._entries) > self._max_items or self._size > self._max_bytes):
            self._size -= self._entries.popleft()[1]
            self._first += 1
        self._grown.set()
        self._grown = anyio.Event()

    def since(self, number: int) -> Iterator[tuple[int, T]]:
        """The remaining entries from `number` on, each with the number of the next one."""
        first = self._first
        for offset, (entry, _) in enumerate(tuple(self._entries)):
            if first + offset >= number:
                yield first + offset + 1, entry

    async def follow(self, number: int) -> AsyncIterator[T]:
        """The entries from `number` on. Never ends."""
        while True:
            grown = self._grown
            for after, entry in self.since(number):
                number = after
                yield entry
            if number >= self.end:
                await grown.wait()


class EventHistory:
    """The machine's events."""

    def __init__(self) -> None:
        self._ids = IdMaker()
        self._events: RingBuffer[tuple[Event, datetime]] = RingBuffer(MAX_EVENTS, MAX_BYTES)

    def publish(self, payload: MachineEventPayload, *, actor_id: str = "") -> None:
        """Add an event to the history."""
        event = Event(data=pack_event(payload), id=self._ids.next(), actor_id=actor_id)
        self._events.append((event, datetime.now(UTC)), len(bytes(event)) + 64)

    async def follow(self, request: EventsRequest) -> AsyncIterator[Event]:
        """The requested past events, then new ones. Never ends."""
        async for event, _ in self._events.follow(self._start(request)):
            if request.with_actor_id in ("", event.actor_id):
                yield event

    def _start(self, request: EventsRequest) -> int:
        past = list(self._events.since(0))
        if request.tail_id:
            return next((after for after, (event, _) in past if event.id == request.tail_id), self._events.end - len(past))
        if request.tail_seconds:
            begin = datetime.now(UTC) - timedelta(seconds=request.tail_seconds)
            return next((after - 1 for after, (_, time) in past if time >= begin), self._events.end)
        if request.tail_events < 0:
            return 0
        return max(self._events.end - request.tail_events, 0)


class LogBuffer(logging.Handler):
    """The last lines of this program's log, from all threads. Must be created on the event loop."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._loop = asyncio.get_running_loop()
        self._lines: RingBuffer[bytes] = RingBuffer(MAX_LINES, MAX_BYTES)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
            text = masked(record.getMessage().replace("\n", " ")[:_LONGEST_LINE])
            line = f"{time} {record.levelname.lower()} {text}\n".encode(errors="replace")
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody reads the log any more
                self._loop.call_soon_threadsafe(self._lines.append, line, len(line))
        except Exception:
            self.handleError(record)

    async def lines(self, *, follow: bool, tail_lines: int) -> AsyncIterator[bytes]:
        """The last lines (all if `tail_lines` is negative), then new ones if `follow`."""
        start = 0 if tail_lines < 0 else max(self._lines.end - tail_lines, 0)
        if follow:
            async for line in self._lines.follow(start):
                yield line
        else:
            for _, line in self._lines.since(start):
                yield line
