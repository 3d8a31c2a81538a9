"""The server's clocks, which tests can replace and step by hand, and deadlines measured by them."""

import heapq
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

import anyio

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A monotonic clock in seconds, two clocks of Unix time, and sleeping."""

    monotonic: Callable[[], float] = time.monotonic
    host_time: Callable[[], float] = time.time
    """This host's Unix time, by which a device reports when it heard a peer."""
    time: Callable[[], float] = time.time
    """The store's Unix time; with several servers, their database's."""
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep


class Deadlines(Generic[K]):
    """At most one deadline per key, by a clock that the caller reads.

    The cost depends on the number of due deadlines, not on their total.
    """

    def __init__(self) -> None:
        self._entries: dict[K, tuple[float, int, K]] = {}
        self._heap: list[tuple[float, int, K]] = []
        """The entries, and some that were replaced or discarded."""
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    @property
    def next_at(self) -> float | None:
        """The earliest deadline, or None."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def set(self, key: K, at: float) -> None:
        """Set or move the key's deadline."""
        entry = self._entries[key] = (at, next(self._numbers), key)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        self._entries.pop(key, None)

    def pop_due(self, now: float) -> K | None:
        """Remove and return one key whose deadline has passed; None if there is none."""
        self._drop_stale()
        if not self._heap or self._heap[0][0] > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._entries[key]
        return key

    def take_due(self, now: float, most: int) -> list[K]:
        """Remove and return up to `most` keys whose deadlines have passed, earliest first."""
        due: list[K] = []
        while len(due) < most and (key := self.pop_due(now)) is not None:
            due.append(key)
        return due

    def _drop_stale(self) -> None:
        while self._heap and self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
