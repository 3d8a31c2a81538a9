"""Lets other processes use this core between batches of small packets.

A program that sends datagrams without a limit fills the interface's queue as fast as it is emptied. Emptying it as soon as a
few packets wait makes small batches and takes the core from the program that receives at the other end, whose socket then
overflows. sched_yield(2) returns at once if no other process waits for this core.
"""

import os
from collections.abc import Callable
from typing import Final

from siderolink.common.clock_watch import boot_time

LONG_TURN: Final = 0.0005
"""Seconds. A process that keeps the core for longer computes; yielding to it costs throughput and gains nothing."""
_LEAST_PAUSE: Final = 4
_GREATEST_PAUSE: Final = 256
_LONGEST_PAUSE: Final = 1.0


class CoreYielder:
    """Yields the core, less often the more often others kept it for long."""

    def __init__(self, *, clock: Callable[[], float] = boot_time) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._not_before = 0.0
        self._pause = _LEAST_PAUSE
        """How many times as long as the next long turn nothing is yielded after it."""

    def yield_core(self) -> None:
        """Let processes that wait for this core run first, unless the last ones kept it for long."""
        before = self._clock()
        if before < self._not_before:
            return
        os.sched_yield()
        now = self._clock()
        if now - before > LONG_TURN:
            self._not_before = now + min(self._pause * (now - before), _LONGEST_PAUSE)
            self._pause = min(2 * self._pause, _GREATEST_PAUSE)
        else:
            self._pause = max(self._pause // 2, _LEAST_PAUSE)
