"""Retry delays: growing, with jitter, and a trigger that ends them early."""

import random
from collections.abc import Callable

import anyio


class Backoff:
    """Full jitter: each delay is uniform between `floor` and a bound that grows from `first` by `factor` up to `cap` (seconds).

    With a factor of 1.5 the delay is at most as long as the attempts so far have taken; with 2, twice as long.
    """

    def __init__(
        self,
        *,
        first: float,
        cap: float,
        floor: float = 0.0,
        at_once: bool = False,
        factor: float = 2.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._first, self._cap, self._floor, self._at_once = first, cap, floor, at_once
        self._factor = factor
        self._uniform = uniform
        self._failures = 0

    def reset(self) -> None:
        """Restart the backoff after a success."""
        self._failures = 0

    def next(self) -> float:
        """The delay in seconds after another failure; 0 for the first one with `at_once`."""
        failures = self._failures - (1 if self._at_once else 0)
        self._failures += 1
        if failures < 0:
            return 0.0
        bound = min(self._cap, self._first * self._factor ** min(failures, 64))
        return self._uniform(self._floor, max(self._floor, bound))


class RetryTrigger:
    """Lets any number of retry loops sleep, and wakes them when a retry is likely to succeed."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def fire(self) -> None:
        """Wake all sleeping loops."""
        self._event.set()
        self._event = anyio.Event()

    async def sleep(self, seconds: float) -> bool:
        """Sleep; returns True if the trigger ended it early."""
        event = self._event
        with anyio.move_on_after(seconds):
            await event.wait()
            return True
        return False
