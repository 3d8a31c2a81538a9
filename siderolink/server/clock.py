"""The server's clocks, which tests can replace and step by hand, and deadlines measured by them."""

import heapq
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
