"""The kernel's state of this host's wall clock (adjtimex(2))."""

import ctypes
import time
from dataclasses import dataclass
from typing import Final

RELEASED: Final = 1_767_225_600
"""The start of 2026, before which no correct clock can be."""
_NOT_SYNCHRONIZED: Final = 5  # TIME_ERROR
_NANOSECONDS: Final = 0x2000  # STA_NANO


class _Timex(ctypes.Structure):
    """The beginning of struct timex; the padding covers the rest on every architecture."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("max_error", ctypes.c_long),
        ("estimated_error", ctypes.c_long),
        ("status", ctypes.c_int),
        ("padding", ctypes.c_char * 456),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockState:
    """The clock state as reported to the kernel by a time service. Times are in seconds."""

    is_plausible: bool
    """False if the clock shows a date before this program was written."""
    is_synchronized: bool
    offset: float
    """The correction that the kernel has yet to apply."""
    max_error: float
    """An upper bound on the clock's error; grows while nothing synchronises it."""


def read_clock() -> ClockState:
    """Read the clock state without changing it, by one system call."""
    found = _Timex()
    state = ctypes.CDLL(None).adjtimex(ctypes.byref(found))
    return ClockState(
        is_plausible=time.time() >= RELEASED,
        is_synchronized=state not in (-1, _NOT_SYNCHRONIZED),
        offset=found.offset / (1e9 if found.status & _NANOSECONDS else 1e6),
        max_error=found.max_error / 1e6,
    )
