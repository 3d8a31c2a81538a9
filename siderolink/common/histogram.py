"""Counting values by size."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Histogram:
    """The number of values per bound: at most this bound, and above the previous one."""

    bounds: tuple[float, ...]
    """Ascending upper bounds."""
    counts: list[int] = field(default_factory=list)
    """One for each bound, and one for values beyond all."""
    total: float = 0.0
    """The sum of the values."""

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def __len__(self) -> int:
        return sum(self.counts)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self.add(value)
