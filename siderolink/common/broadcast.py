"""Hand each event to every listener, none of whom can hold up the giver."""

from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


class Broadcast(Generic[T]):
    """Publishes events to any number of async iterators, and keeps the last few for those who come late."""

    def __init__(self, *, history: int = 256) -> None:
        self._history: deque[T] = deque(maxlen=history)
        self._listeners: set[_Listener[T]] = set()
        self._closed = False

    def publish(self, event: T) -> None:
        """Never blocks: a listener that lags by more than its queue loses its oldest events."""
        self._history.append(event)
        for listener in self._listeners:
            listener.put(event)

    def close(self) -> None:
        """End every iterator once it has given what it holds."""
        self._closed = True
        for listener in self._listeners:
            listener.wake()

    async def listen(self, *, past: bool = True, limit: int = 4096) -> AsyncIterator[T]:
        """What happened (where `past`), then what happens, until closed; more than `limit` unread drops the oldest."""
        listener: _Listener[T] = _Listener(self._history if past else (), limit)
        self._listeners.add(listener)
        try:
            while True:
                while listener.queue:
                    yield listener.queue.popleft()
                if self._closed:
                    return
                await listener.wait()
        finally:
            self._listeners.discard(listener)


class _Listener(Generic[T]):
    def __init__(self, past: "deque[T] | tuple[()]", limit: int) -> None:
        self.queue: deque[T] = deque(past, maxlen=limit)
        self._event = anyio.Event()

    def put(self, event: T) -> None:
        self.queue.append(event)
        self._event.set()

    def wake(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()
