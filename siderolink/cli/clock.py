"""This host's wall clock, as the kernel knows it (adjtimex(2))."""

import ctypes
import time
from dataclasses import dataclass
from typing import Final

RELEASED: Final = 1_767_225_600
"""The start of 2026: no clock that is right shows less."""
_NOT_SYNCHRONIZED: Final = 5  # TIME_ERROR
_NANOSECONDS: Final = 0x2000  # STA_NANO


class _Timex(ctypes.Structure):
    """The beginning of struct timex; the rest is longer on no architecture than the padding."""

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
    """The clock state that a time service reported to the kernel. Times are in seconds."""

    is_plausible: bool
    """False where the clock shows a date before this program was written."""
    is_synchronized: bool
    offset: float
    """How far the kernel is still to turn the clock."""
    max_error: float
    """A bound on how wrong the clock is; grows while nothing keeps it right."""


def read_clock() -> ClockState:
    """Read only; takes a system call."""
    found = _Timex()
    state = ctypes.CDLL(None).adjtimex(ctypes.byref(found))
    return ClockState(
        is_plausible=time.time() >= RELEASED,
        is_synchronized=state not in (-1, _NOT_SYNCHRONIZED),
        offset=found.offset / (1e9 if found.status & _NANOSECONDS else 1e6),
        max_error=found.max_error / 1e6,
    )
