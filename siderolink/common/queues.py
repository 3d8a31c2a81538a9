"""Bounded queues between a producer that must never block and a possibly slow consumer.

============== =========================== ==============================================================
class          consumer                    when it is full
============== =========================== ==============================================================
Subscription   one reader of a Broadcast   DROP_OLDEST: the oldest items are dropped, the reader gets their number.
                                           DROP_ALL: all items are dropped, the reader starts over.
DeliveryQueue  the one task that delivers  The oldest items are dropped; `lost` counts them.
LineQueue      a writer thread             The newest item is refused; `dropped` counts them.
============== =========================== ==============================================================

All are bounded in items, and in bytes if items have a size. A single item larger than the byte limit is kept while it is alone,
except in LineQueue.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from enum import Enum, auto
from typing import Generic, Self, TypeVar
from weakref import ref

import anyio
from anyio.lowlevel import checkpoint

T = TypeVar("T")

_AT_ONCE = 32
"""Waiting items that a reader gets before other tasks run: it may await nothing else."""
Lost = Callable[[int], T]
"""Creates the item that reports the number of lost items to a reader."""


class Overflow(Enum):
    """The items that a subscription drops when its reader is too slow."""

    DROP_OLDEST = auto()
    """The oldest items, for readers to which each item is independent."""
    DROP_ALL = auto()
    """All waiting items, for readers that then read the complete state again."""


class Subscription(AsyncIterator[T]):
    """The unread items of one reader; iteration ends with the broadcast."""

    def __init__(
        self,
        past: Iterable[tuple[T, int]] = (),
        *,
        limit: int,
        max_bytes: int | None = None,
        lost: "Lost[T] | None" = None,
        overflow: Overflow = Overflow.DROP_OLDEST,
        wanted: Callable[[T], bool] | None = None,
    ) -> None:
        self._waiting: deque[tuple[T, int]] = deque()
        self._wanted = wanted
        self._limit, self._max_bytes = limit, max_bytes
        self._lost_item = lost
        self._overflow = overflow
        self._size = 0
        self._lost = 0
        self._taken = 0
        """Items that the iteration has returned since other tasks last ran."""
        self._reader: asyncio.Future[None] | None = None
        """Awaited by the reader while nothing is queued."""
        self._ended = False
        for item, size in past:
            self.add(item, size)

    def add(self, item: T, size: int = 0) -> None:
        """Queue an item of `size` bytes, if it is wanted. Never blocks."""
        if self._wanted is not None and not self._wanted(item):
            return
        self._waiting.append((item, size))
        self._size += size
        if len(self._waiting) > self._limit or self._max_bytes is not None and self._is_full():
            self._make_room()
        if self._reader is not None:
            self._wake()

    def take_waiting(self, most: int | None = None) -> list[T]:
        """All waiting items, or the `most` oldest ones, without waiting for more."""
        found: list[T] = []
        if self._lost and self._lost_item is not None:
            lost, self._lost = self._lost, 0
            found.append(self._lost_item(lost))
        while self._waiting and (most is None or len(found) < most):
            found.append(self._pop())
        return found

    def end(self) -> None:
        """Stop after the reader has taken the waiting items."""
        self._ended = True
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._taken == _AT_ONCE:
            self._taken = 0
            await checkpoint()
        self._taken += 1
        while True:
            if self._lost and self._lost_item is not None:
                lost, self._lost = self._lost, 0
                return self._lost_item(lost)
            if self._waiting:
                return self._pop()
            self._taken = 1
            if not await self.wait():
                raise StopAsyncIteration

    async def wait(self) -> bool:
        """Wait until there is an item; returns False once there never will be one."""
        while not self._waiting and not (self._lost and self._lost_item is not None):
            if self._ended:
                return False
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return True

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _is_full(self) -> bool:
        if len(self._waiting) > self._limit:
            return True
        return self._max_bytes is not None and self._size > self._max_bytes and len(self._waiting) > 1

    def _make_room(self) -> None:
        if self._overflow is Overflow.DROP_ALL:
            self._lost += len(self._waiting)
            self._waiting.clear()
            self._size = 0
            return
        while self._is_full():
            self._pop()
            self._lost += 1

    def _pop(self) -> T:
        item, size = self._waiting.popleft()
        self._size -= size
        return item


class Broadcast(Generic[T]):
    """Publishes each item to every referenced subscription, and the last `history` items to new subscriptions.

    A reader may lag by `limit` items and `max_bytes`; `lost` creates the item that reports what it missed.
    """

    def __init__(
        self,
        *,
        limit: int = 4096,
        max_bytes: int | None = None,
        history: int = 0,
        lost: "Lost[T] | None" = None,
        overflow: Overflow = Overflow.DROP_OLDEST,
    ) -> None:
        self._limit, self._max_bytes = limit, max_bytes
        self._lost = lost
        self._overflow = overflow
        self._history: deque[tuple[T, int]] = deque(maxlen=history)
        self._subscriptions: dict[ref[Subscription[T]], None] = {}
        self._ended = False

    def subscribe(self, limit: int | None = None, wanted: Callable[[T], bool] | None = None) -> Subscription[T]:
        """The kept history, then everything published from now on; or only what is `wanted`.

        `wanted` is called with each item when it is published; it must be fast and not raise.
        """
        found = Subscription(
            self._history,
            limit=self._limit if limit is None else limit,
            max_bytes=self._max_bytes,
            lost=self._lost,
            overflow=self._overflow,
            wanted=wanted,
        )
        if self._ended:
            found.end()
        else:
            self._subscriptions[ref(found, self._forget)] = None
        return found

    def publish(self, item: T, size: int = 0) -> None:
        """Publish an item of `size` bytes. Never blocks."""
        self._history.append((item, size))
        for held in tuple(self._subscriptions):
            subscription = held()
            if subscription is not None:
                subscription.add(item, size)

    def end(self) -> None:
        """End every subscription once its reader has taken the waiting items."""
        self._ended = True
        for held in tuple(self._subscriptions):
            subscription = held()
            if subscription is not None:
                subscription.end()
        self._subscriptions.clear()

    def _forget(self, held: "ref[Subscription[T]]") -> None:
        self._subscriptions.pop(held, None)


class DeliveryQueue(Generic[T]):
    """Items to be delivered to one destination. Items leave it only when acknowledged, or as the oldest of a full queue."""

    def __init__(self, *, max_items: int, max_bytes: int) -> None:
        self.lost = 0
        """Number of items dropped because the queue was full."""
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._max_items, self._max_bytes = max_items, max_bytes
        self._first = 0
        self._changed = anyio.Event()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def first(self) -> int:
        """The number of the oldest item; numbers increase by one with each `put`."""
        return self._first

    @property
    def end(self) -> int:
        """The number of the next item."""
        return self._first + len(self._items)

    def put(self, item: T, size: int) -> None:
        """Queue an item of `size` bytes. Never blocks."""
        self._items.append((item, size))
        self._size += size
        while len(self._items) > self._max_items or (self._size > self._max_bytes and len(self._items) > 1):
            self._drop_first()
            self.lost += 1
        self._changed.set()

    def get(self, number: int) -> T:
        """The item with this number, which must still be queued."""
        return self._items[number - self._first][0]

    def acknowledge(self, number: int) -> None:
        """Remove every item before `number`, because they were delivered."""
        while self._items and self._first < number:
            self._drop_first()

    def put_back(self, items: Sequence[tuple[T, int]]) -> None:
        """Queue the last acknowledged items again, oldest first; as many of the newest as fit."""
        for item, size in reversed(items):
            if len(self._items) >= self._max_items or self._size + size > self._max_bytes:
                break
            self._items.appendleft((item, size))
            self._size += size
            self._first -= 1
        self._changed.set()

    async def wait_beyond(self, number: int) -> None:
        """Wait until there is an item with this number or a higher one."""
        while self.end <= number:
            self._changed = anyio.Event()
            await self._changed.wait()

    def _drop_first(self) -> None:
        _, size = self._items.popleft()
        self._size -= size
        self._first += 1


class LineQueue(Generic[T]):
    """Items from any thread for one thread. `put` never blocks: a full queue refuses the item and counts it."""

    def __init__(self, *, max_items: int, max_bytes: int) -> None:
        self.dropped = 0
        """Number of items refused because the queue was full."""
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._max_items, self._max_bytes = max_items, max_bytes
        self._changed = threading.Condition()
        self._ended = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T, size: int) -> bool:
        """Queue an item of `size` bytes; returns False if it does not fit. Never blocks."""
        with self._changed:
            if self._ended or len(self._items) >= self._max_items or self._size + size > self._max_bytes:
                self.dropped += 1
                return False
            self._items.append((item, size))
            self._size += size
            self._changed.notify()
            return True

    def take(self, most: int, timeout: float | None = None) -> list[T] | None:
        """Up to `most` items, after waiting for the first; empty after `timeout` seconds, None once ended and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ended, timeout)
            if not self._items and self._ended:
                return None
            found: list[T] = []
            while self._items and len(found) < most:
                item, size = self._items.popleft()
                self._size -= size
                found.append(item)
            return found

    def end(self) -> None:
        """Refuse further items; the consumer finishes the waiting ones."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
