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

    def __init__(self, limit: int) -> None:
        self._waiting: deque[T] = deque()
        self._limit = limit
        self._lost = 0
        self._ready = anyio.Event()
        self._ended = False

    def add(self, report: T) -> None:
        if len(self._waiting) >= self._limit:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(report)
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
                return self._waiting.popleft()
            if self._ended:
                raise StopAsyncIteration
            self._ready = anyio.Event()
            await self._ready.wait()


class Feed(Generic[T]):
    """Gives each report to every stream that someone still holds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._streams: WeakSet[ReportStream[T]] = WeakSet()
        self._ended = False

    def subscribe(self) -> ReportStream[T]:
        stream: ReportStream[T] = ReportStream(self._limit)
        if self._ended:
            stream.end()
        else:
            self._streams.add(stream)
        return stream

    def publish(self, report: T) -> None:
        for stream in self._streams:
            stream.add(report)

    def end(self) -> None:
        self._ended = True
        for stream in list(self._streams):
            stream.end()
        self._streams.clear()
