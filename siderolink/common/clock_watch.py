"""Tells when the wall clock was set or the host has woken from sleep: the kernel ends a timer for it (timerfd_create(2))."""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from typing import Final

_CLOEXEC_NONBLOCK: Final = os.O_CLOEXEC | os.O_NONBLOCK
_ABSOLUTE_AND_CANCEL_ON_SET: Final = 1 | 2
_FAR: Final = 1 << 40
"""Seconds; no clock is ever there."""


class _Spec(ctypes.Structure):
    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


_libc = ctypes.CDLL(None, use_errno=True)


class ClockWatch:
    """Calls `on_jump` each time. On a kernel without such timers it never does."""

    def __init__(self, on_jump: Callable[[], None]) -> None:
        self._on_jump = on_jump
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(_libc.timerfd_create(time.CLOCK_REALTIME, _CLOEXEC_NONBLOCK))
        if self._descriptor >= 0 and self._arm():
            self._loop.add_reader(self._descriptor, self._read)

    def close(self) -> None:
        """Does nothing the second time."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _arm(self) -> bool:
        spec = _Spec(0, 0, _FAR, 0)
        return not _libc.timerfd_settime(self._descriptor, _ABSOLUTE_AND_CANCEL_ON_SET, ctypes.byref(spec), None)

    def _read(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            return
        except OSError:  # ECANCELED: the clock was set
            pass
        self._arm()
        self._on_jump()


def seconds_asleep() -> float:
    """How long the host has slept since it was started; only differences mean something."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
