"""Sampling of repeated records: the first of each kind in an interval are shown, the rest are counted. No I/O."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_SECONDS = 10.0
MAX_KINDS = 4096
"""Maximum kinds of records tracked individually; further kinds share one interval."""
_OTHERS = "others"


@dataclass(frozen=True, slots=True)
class Suppressed:
    """The number of records of one kind that were not shown."""

    kind: str
    name: str
    """The event name of the records."""
    count: int
    seconds: float


@dataclass(slots=True)
class _Interval:
    name: str
    began: float
    seen: int = 0
    shown: int = 0


class RecordSampler:
    """Admits a burst of records of each kind per interval, which begins with the first record. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._intervals: OrderedDict[str, _Interval] = OrderedDict()
        self._ended: list[Suppressed] = []
        self._lock = threading.Lock()

    def admit(self, kind: str, burst: int, name: str) -> bool:
        """Whether a record of this kind is shown."""
        with self._lock:
            now = self._clock()
            self._end_before(now)
            if kind not in self._intervals and len(self._intervals) >= MAX_KINDS:
                kind = _OTHERS
            interval = self._intervals.get(kind)
            if interval is None:
                interval = self._intervals[kind] = _Interval(name, now)
            interval.seen += 1
            if interval.shown >= burst:
                return False
            interval.shown += 1
            return True

    def expired(self, now: float) -> list[Suppressed]:
        """The suppressed counts of intervals that ended by `now`. Each is returned once."""
        with self._lock:
            self._end_before(now)
            ended, self._ended = self._ended, []
            return ended

    def _end_before(self, now: float) -> None:
        """End the intervals that are over, oldest first."""
        while self._intervals:
            kind, interval = next(iter(self._intervals.items()))
            if now < interval.began + INTERVAL_SECONDS:
                return
            del self._intervals[kind]
            if hidden := interval.seen - interval.shown:
                self._ended.append(Suppressed(kind, interval.name, hidden, INTERVAL_SECONDS))
