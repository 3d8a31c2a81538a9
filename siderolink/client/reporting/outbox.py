"""What waits to be delivered: bounded, the oldest give way, and how many did is counted."""

from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import anyio

T = TypeVar("T")


class Outbox(Generic[T]):
    """A queue between whoever reports and the one task that delivers. Nothing leaves it before it is acknowledged."""

    def __init__(self, *, max_items: int, max_bytes: int) -> None:
        self.lost = 0
        """How many were dropped because too many waited."""
        self._items: deque[tuple[T, int]] = deque()
        self._size = 0
        self._max_items, self._max_bytes = max_items, max_bytes
        self._first = 0
        self._changed = anyio.Event()

    def __len__(self) -> int:
        return len(self._items)

    @property
    def first(self) -> int:
        """The number of the oldest one that waits; numbers rise by one with each that was put."""
        return self._first

    @property
    def end(self) -> int:
        """The number that the next one will have."""
        return self._first + len(self._items)

    def put(self, item: T, size: int) -> None:
        """Never waits."""
        self._items.append((item, size))
        self._size += size
        while len(self._items) > self._max_items or (self._size > self._max_bytes and len(self._items) > 1):
            self._drop_first()
            self.lost += 1
        self._changed.set()

    def get(self, number: int) -> T:
        """The item of that number, which must not be gone."""
        return self._items[number - self._first][0]

    def acknowledge(self, number: int) -> None:
        """What comes before `number` has been delivered."""
        while self._items and self._first < number:
            self._drop_first()

    def put_back(self, items: Sequence[tuple[T, int]]) -> None:
        """What was acknowledged last, oldest first, waits again: as much of it as there is room for, the newest of it."""
        for item, size in reversed(items):
            if len(self._items) >= self._max_items or self._size + size > self._max_bytes:
                break
            self._items.appendleft((item, size))
            self._size += size
            self._first -= 1
        self._changed.set()

    async def wait_beyond(self, number: int) -> None:
        """Wait until there is an item of this number or a later one."""
        while self.end <= number:
            self._changed = anyio.Event()
            await self._changed.wait()

    def _drop_first(self) -> None:
        _, size = self._items.popleft()
        self._size -= size
        self._first += 1
