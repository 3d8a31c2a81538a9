"""The server's clocks, which tests can replace and step by hand, and deadlines measured by them."""

import logging
import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from itertools import count
from typing import Generic, TypeVar

import anyio

from siderolink.common.clock_watch import boot_time

log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)


CLOCK_ERROR = 60.0
"""A stored time that is later than the present one by more than these seconds is from a clock that was ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A monotonic clock in seconds, two clocks of Unix time, and sleeping."""

    monotonic: Callable[[], float] = time.monotonic
    host_time: Callable[[], float] = time.time
    """This host's Unix time, by which a device reports when it heard a peer."""
    time: Callable[[], float] = time.time
    """The store's Unix time; with several servers, their database's."""
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep


class RetentionTime:
    """Unix time by which old records are deleted: a jump forward counts only once the clock has kept it for a day.

    Otherwise a clock that is wrong for a moment would delete everything.
    """

    JUMP_SECONDS = 3600.0
    KEPT_SECONDS = 86_400.0

    def __init__(self, what: str, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = boot_time) -> None:
        """`what` is deleted, for the log."""
        self._what = what
        self._clock = clock
        self._monotonic = monotonic
        self._offset = clock() - monotonic()
        self._jump: tuple[float, float] | None = None
        """The offset after a jump, and when it was noticed."""

    def __call__(self) -> float:
        now = self._monotonic()
        offset = self._clock() - now
        if offset <= self._offset + self.JUMP_SECONDS:
            self._offset, self._jump = offset, None
        elif self._jump is None or offset > self._jump[0] + self.JUMP_SECONDS:
            self._jump = offset, now
            log.warning(
                "the clock was set forward by %.0f s: old %s are deleted by it only if it stays so for a day",
                offset - self._offset,
                self._what,
            )
        elif now - self._jump[1] >= self.KEPT_SECONDS:
            self._offset, self._jump = offset, None
        return now + self._offset


class SteadyTime:
    """A clock that goes on at its pace where the given one is set back."""

    def __init__(self, clock: Callable[[], float], monotonic: Callable[[], float] = boot_time) -> None:
        self._clock = clock
        self._monotonic = monotonic
        self._last, self._at = clock(), monotonic()

    def __call__(self) -> float:
        now, at = self._clock(), self._monotonic()
        expected = self._last + at - self._at
        # less is an error of measuring a clock elsewhere, which must not add up
        self._last, self._at = expected if now < expected - CLOCK_ERROR else now, at
        return self._last


class Deadlines(Generic[K]):
    """At most one deadline per key, by a clock that the caller reads.

    A binary heap that knows where each key is. So a replaced or discarded entry is removed at once; entries that stay in the
    heap until later have to be removed many at a time.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        self._places: dict[K, int] = {}
        """Where each key's entry is in the heap."""
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._heap)

    def __contains__(self, key: K) -> bool:
        return key in self._places

    @property
    def next_at(self) -> float | None:
        """The earliest deadline, or None."""
        return self._heap[0][0] if self._heap else None

    def set(self, key: K, at: float) -> None:
        """Set or move the key's deadline."""
        entry = (at, next(self._numbers), key)
        place = self._places.get(key)
        if place is None:
            place = len(self._heap)
            self._heap.append(entry)
        self._put(place, entry)

    def discard(self, key: K) -> None:
        place = self._places.pop(key, None)
        if place is None:
            return
        last = self._heap.pop()
        if place < len(self._heap):
            self._put(place, last)

    def pop_due(self, now: float) -> K | None:
        """Remove and return one key whose deadline has passed; None if there is none."""
        if not self._heap or self._heap[0][0] > now:
            return None
        key = self._heap[0][2]
        self.discard(key)
        return key

    def take_due(self, now: float, most: int) -> list[K]:
        """Remove and return up to `most` keys whose deadlines have passed, earliest first."""
        due: list[K] = []
        while len(due) < most and (key := self.pop_due(now)) is not None:
            due.append(key)
        return due

    def _put(self, place: int, entry: tuple[float, int, K]) -> None:
        """Put an entry at a place that is free, or where it belongs above or below it."""
        heap, places = self._heap, self._places
        while place and entry < heap[parent := (place - 1) // 2]:
            heap[place] = heap[parent]
            places[heap[place][2]] = place
            place = parent
        while (child := 2 * place + 1) < len(heap):
            if child + 1 < len(heap) and heap[child + 1] < heap[child]:
                child += 1
            if entry < heap[child]:
                break
            heap[place] = heap[child]
            places[heap[place][2]] = place
            place = child
        heap[place] = entry
        places[entry[2]] = place
