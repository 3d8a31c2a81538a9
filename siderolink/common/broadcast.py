"""Hand each event to every reader, none of whom can hold up the giver or grow without bound."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Generic, Self, TypeVar
from weakref import WeakSet

import anyio

T = TypeVar("T")

Lost = Callable[[int], T]
"""Makes what a reader is told that lost so many of its oldest events."""


class Subscription(AsyncIterator[T]):
    """What one reader has yet to read; it ends when the giver does. Bounded: the oldest give way."""

    def __init__(self, past: Iterable[tuple[T, int]], limit: int, max_bytes: int | None, lost: "Lost[T] | None") -> None:
        self._waiting: deque[tuple[T, int]] = deque()
        self._limit, self._max_bytes = limit, max_bytes
        self._lost_event = lost
        self._size = 0
        self._lost = 0
        self._ready = anyio.Event()
        self._ended = False
        for event, size in past:
            self.add(event, size)

    def add(self, event: T, size: int) -> None:
        self._waiting.append((event, size))
        self._size += size
        while self._is_too_much():
            self._take()
            self._lost += 1
        self._ready.set()

    def end(self) -> None:
        """Let the reader finish what waits, then stop."""
        self._ended = True
        self._ready.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while True:
            if self._lost and self._lost_event is not None:
                lost, self._lost = self._lost, 0
                return self._lost_event(lost)
            if self._waiting:
                return self._take()
            if self._ended:
                raise StopAsyncIteration
            self._ready = anyio.Event()
            await self._ready.wait()

    def _is_too_much(self) -> bool:
        if len(self._waiting) > self._limit:
            return True
        return self._max_bytes is not None and self._size > self._max_bytes and len(self._waiting) > 1

    def _take(self) -> T:
        event, size = self._waiting.popleft()
        self._size -= size
        return event


class Broadcast(Generic[T]):
    """Gives each event to every subscription that someone still holds, and the last `history` to those that come late.

    A reader may lag by `limit` events and, where they have sizes, by `max_bytes`; with `lost` it is told what it missed.
    """

    def __init__(
        self, *, limit: int = 4096, max_bytes: int | None = None, history: int = 0, lost: "Lost[T] | None" = None
    ) -> None:
        self._limit, self._max_bytes = limit, max_bytes
        self._lost = lost
        self._history: deque[tuple[T, int]] = deque(maxlen=history)
        self._subscriptions: WeakSet[Subscription[T]] = WeakSet()
        self._ended = False

    def subscribe(self, limit: int | None = None) -> Subscription[T]:
        """What is kept of the past, then what happens from now on."""
        found = Subscription(self._history, self._limit if limit is None else limit, self._max_bytes, self._lost)
        if self._ended:
            found.end()
        else:
            self._subscriptions.add(found)
        return found

    def publish(self, event: T, size: int = 0) -> None:
        """Hand out an event of `size` bytes. Never blocks."""
        self._history.append((event, size))
        for subscription in self._subscriptions:
            subscription.add(event, size)

    def end(self) -> None:
        """End every subscription once its reader has what waits."""
        self._ended = True
        for subscription in list(self._subscriptions):
            subscription.end()
        self._subscriptions.clear()
