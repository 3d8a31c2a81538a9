"""A token bucket: allows a burst, then a rate."""

import time
from collections.abc import Callable


class TokenBucket:
    """Contains at most `burst` units and gains `rate` units per second. A rate of 0 disables the limit."""

    __slots__ = ("_burst", "_clock", "_level", "_rate", "_seen_at")

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level = burst
        self._seen_at = clock()

    def take(self, units: float) -> bool:
        """Take units if available; otherwise returns False and takes nothing."""
        if not self._rate:
            return True
        self._refill()
        if units > self._level:
            return False
        self._level -= units
        return True

    def charge(self, units: float) -> None:
        """Take units even if not available; the bucket stays empty until the debt is repaid."""
        if self._rate:
            self._refill()
            self._level -= units

    @property
    def is_empty(self) -> bool:
        """Whether less than one unit is available."""
        if not self._rate:
            return False
        self._refill()
        return self._level < 1

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._seen_at) * self._rate)
        self._seen_at = now
