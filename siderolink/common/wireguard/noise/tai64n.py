"""TAI64N timestamps: they order a peer's initiations, so they must rise and need not be exact."""

import math
import struct

_TAI64N = struct.Struct(">QI")
_TAI_BASE = 2**62 + 10
_NANOSECONDS = 1_000_000_000
_GRAIN = 1 << 24
"""Nanoseconds are rounded down to about 17 ms: enough to order handshakes, too coarse to reveal the clock's phase."""


def later(stamp: bytes, seconds: float) -> bytes:
    """A timestamp the given seconds (rounded up) after another; all zeros means none, and stays."""
    if not any(stamp):
        return stamp
    whole, nanoseconds = _TAI64N.unpack(stamp)
    return _TAI64N.pack(whole + math.ceil(seconds), nanoseconds)


class Timestamps:
    """Rising timestamps from a clock that may jump back.

    `high_water` is the last timestamp handed out (12 bytes), to be remembered with a persistent key across restarts.
    """

    __slots__ = ("high_water",)

    def __init__(self, high_water: bytes = bytes(12)) -> None:
        self.high_water = high_water

    def next(self, unix_time_ns: int) -> bytes:
        """A timestamp for now, or just above the last one where the clock has gone back."""
        seconds, nanoseconds = divmod(unix_time_ns, _NANOSECONDS)
        stamp = _TAI64N.pack(_TAI_BASE + seconds, nanoseconds - nanoseconds % _GRAIN)
        if stamp <= self.high_water:
            seconds, nanoseconds = _TAI64N.unpack(self.high_water)
            nanoseconds += _GRAIN
            if nanoseconds >= _NANOSECONDS:
                seconds, nanoseconds = seconds + 1, 0
            stamp = _TAI64N.pack(seconds, nanoseconds)
        self.high_water = stamp
        return stamp
