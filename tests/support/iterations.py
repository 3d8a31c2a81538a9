"""Counts what happens in each iteration of the event loop."""

import asyncio
from collections import Counter
from types import TracebackType


class Iterations:
    """While its context is open, `note` counts by the number of the iteration."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self._number = 0
        self._handle: asyncio.Handle | None = None

    @property
    def most(self) -> int:
        """The count of the iteration with most."""
        return max(self.counts.values(), default=0)

    @property
    def total(self) -> int:
        return self.counts.total()

    def note(self, count: int = 1) -> None:
        self.counts[self._number] += count

    def __enter__(self) -> "Iterations":
        self._next()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._handle is not None
        self._handle.cancel()

    def _next(self) -> None:
        self._number += 1
        self._handle = asyncio.get_running_loop().call_soon(self._next)
