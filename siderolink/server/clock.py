"""The two clocks of the server, in one place so that tests can turn them by hand."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Seconds since some moment, never going back; and Unix time in seconds."""

    monotonic: Callable[[], float] = time.monotonic
    time: Callable[[], float] = time.time
