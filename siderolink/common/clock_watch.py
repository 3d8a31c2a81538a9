"""Clocks missing in event loops: one that runs while the host sleeps, and notice of changes of the wall clock.

Both are kernel timers (timerfd_create(2)).
"""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Final

_CLOEXEC_NONBLOCK: Final = os.O_CLOEXEC | os.O_NONBLOCK
_ABSOLUTE: Final = 1
_CANCEL_ON_SET: Final = 2
_FAR: Final = 1 << 40
"""A time in seconds that no clock reaches."""


class _Spec(ctypes.Structure):
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _set_timer(descriptor: int, flags: int, at: float) -> bool:
    seconds = int(at)
    spec = _Spec(0, 0, seconds, int((at - seconds) * 1e9))
    return not _libc.timerfd_settime(descriptor, flags, ctypes.byref(spec), None)


boot_time: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""Seconds on a clock that also runs while the host sleeps."""


class BootTimer:
    """One timer on `boot_time`. Deadlines that pass while the host sleeps fire when it wakes.

    An event loop's own timers stop during sleep. They are the fallback if the kernel has no such timer.
    """

    def __init__(self, on_due: Callable[[], None]) -> None:
        self._on_due = on_due
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.TimerHandle | None = None
        self._descriptor = int(_libc.timerfd_create(time.CLOCK_BOOTTIME, _CLOEXEC_NONBLOCK))
        if self._descriptor >= 0:
            self._loop.add_reader(self._descriptor, self._on_readable)

    def fileno(self) -> int:
        """The timer's descriptor; -1 without one."""
        return self._descriptor

    def set(self, at: float) -> None:
        """Call back once at this time, or immediately if it has passed. Replaces the previous time."""
        if self._descriptor >= 0:
            _set_timer(self._descriptor, _ABSOLUTE, max(at, 1e-6))  # zero would disarm it
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_later(max(0.0, at - boot_time()), self._on_due)

    def close(self) -> None:
        """Idempotent."""
        if self._handle is not None:
            self._handle.cancel()
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _on_readable(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:  # it was set again meanwhile
            return
        self._on_due()


class ClockWatch:
    """Calls `on_jump` when the wall clock was set or the host has woken up. Never, if the kernel has no such timers."""

    def __init__(self, on_jump: Callable[[], None]) -> None:
        self._on_jump = on_jump
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(_libc.timerfd_create(time.CLOCK_REALTIME, _CLOEXEC_NONBLOCK))
        if self._descriptor >= 0 and self._arm():
            self._loop.add_reader(self._descriptor, self._on_readable)

    def close(self) -> None:
        """Idempotent."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _arm(self) -> bool:
        return _set_timer(self._descriptor, _ABSOLUTE | _CANCEL_ON_SET, _FAR)

    def _on_readable(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            return
        except OSError:  # ECANCELED: the clock was set
            pass
        self._arm()
        self._on_jump()


def seconds_asleep() -> float:
    """How long the host has slept since boot; only differences are meaningful."""
    return boot_time() - time.clock_gettime(time.CLOCK_MONOTONIC)
