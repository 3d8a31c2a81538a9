"""Hands reports to any number of readers, none of whom can hold up the giver or grow without bound."""

from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, Self, TypeVar
from weakref import WeakSet

import anyio

from siderolink.server.reporting.reports import ReportsLost

T = TypeVar("T")


class ReportStream(AsyncIterator[T | ReportsLost]):
    """What was published since it was made; ends when the server does. The oldest give way, and that is said."""

    def __init__(self, limit: int, max_bytes: int) -> None:
        self._waiting: deque[tuple[T, int]] = deque()
        self._limit, self._max_bytes = limit, max_bytes
        self._size = 0
        self._lost = 0
        self._ready = anyio.Event()
        self._ended = False

    def add(self, report: T, size: int) -> None:
        self._waiting.append((report, size))
        self._size += size
        while len(self._waiting) > self._limit or (self._size > self._max_bytes and len(self._waiting) > 1):
            self._take()
            self._lost += 1
        self._ready.set()

    def end(self) -> None:
        """Let the reader finish what waits, then stop."""
        self._ended = True
        self._ready.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T | ReportsLost:
        while True:
            if self._lost:
                lost, self._lost = self._lost, 0
                return ReportsLost(count=lost)
            if self._waiting:
                return self._take()
            if self._ended:
                raise StopAsyncIteration
            self._ready = anyio.Event()
            await self._ready.wait()

    def _take(self) -> T:
        report, size = self._waiting.popleft()
        self._size -= size
        return report


class Feed(Generic[T]):
    """Gives each report to every stream that someone still holds."""

    def __init__(self, limit: int, max_bytes: int) -> None:
        self._limit, self._max_bytes = limit, max_bytes
        self._streams: WeakSet[ReportStream[T]] = WeakSet()
        self._ended = False

    def subscribe(self) -> ReportStream[T]:
        stream: ReportStream[T] = ReportStream(self._limit, self._max_bytes)
        if self._ended:
            stream.end()
        else:
            self._streams.add(stream)
        return stream

    def publish(self, report: T, size: int) -> None:
        """Hand out a report of `size` bytes."""
        for stream in self._streams:
            stream.add(report, size)

    def end(self) -> None:
        self._ended = True
        for stream in list(self._streams):
            stream.end()
        self._streams.clear()
