"""TAI64N timestamps: they order a peer's initiations, so they must rise and need not be exact."""

import math
import struct
from collections.abc import Callable

_TAI64N = struct.Struct(">QI")
_TAI_BASE = 2**62 + 10
_NANOSECONDS = 1_000_000_000
_GRAIN = 1 << 24
"""Nanoseconds are rounded down to about 17 ms: enough to order handshakes, too coarse to reveal the clock's phase."""


def later(stamp: bytes, seconds: float) -> bytes:
    """A timestamp the given seconds (rounded up) after another. All zeros mean no timestamp and are returned unchanged."""
    if not any(stamp):
        return stamp
    whole, nanoseconds = _TAI64N.unpack(stamp)
    return _TAI64N.pack(whole + math.ceil(seconds), nanoseconds)


class Timestamps:
    """Rising timestamps from a clock that may jump back.

    `high_water` is the last timestamp issued (12 bytes), which must be stored together with a persistent key.
    """

    __slots__ = ("high_water",)

    def __init__(self, high_water: bytes = bytes(12)) -> None:
        self.high_water = high_water

    def next(self, unix_time_ns: int) -> bytes:
        """A timestamp for now, or just above the last one if the clock was set back."""
        stamp = _stamp_of(unix_time_ns)
        if stamp <= self.high_water:
            stamp = _just_above(self.high_water)
        self.high_water = stamp
        return stamp

    def for_peer(self, peer: bytes, unix_time_ns: int) -> bytes | None:
        """A timestamp for a handshake with this peer; None if none can be started now."""
        return self.next(unix_time_ns)


class CommonTimestamps(Timestamps):
    """Timestamps of a key that several hosts use at the same time: taken from a common clock, rising for each peer.

    No timestamp is more than MAX_AHEAD seconds ahead of that clock, so a host that takes over a peer can use timestamps above
    all that another host has sent.
    """

    __slots__ = ("_floor", "_last", "_unix_time_ns")

    MAX_AHEAD = 2.0

    def __init__(self, unix_time_ns: Callable[[], int], high_water: bytes = bytes(12)) -> None:
        """`high_water`: the highest timestamp that the key is known to have used, possibly by another clock."""
        super().__init__(high_water)
        self._unix_time_ns = unix_time_ns
        self._floor = high_water
        self._last: dict[bytes, bytes] = {}

    def for_peer(self, peer: bytes, unix_time_ns: int) -> bytes | None:
        """A timestamp for the peer by the common clock; None if it would be too far ahead."""
        now = stamp = max(_stamp_of(self._unix_time_ns()), self._floor)
        last = self.last(peer)
        if stamp <= last:
            stamp = _just_above(last)
            if stamp > later(now, self.MAX_AHEAD):
                return None
        self._last[peer] = stamp
        self.high_water = max(self.high_water, stamp)
        return stamp

    def last(self, peer: bytes) -> bytes:
        """The last timestamp known to have been sent to the peer."""
        return self._last.get(peer, bytes(12))

    def begin_above(self, peer: bytes, stamp: bytes) -> None:
        """Note a timestamp that another host has sent to the peer."""
        if stamp > self.last(peer):
            self._last[peer] = stamp


def _stamp_of(unix_time_ns: int) -> bytes:
    seconds, nanoseconds = divmod(unix_time_ns, _NANOSECONDS)
    return _TAI64N.pack(_TAI_BASE + seconds, nanoseconds - nanoseconds % _GRAIN)


def _just_above(stamp: bytes) -> bytes:
    seconds, nanoseconds = _TAI64N.unpack(stamp)
    nanoseconds += _GRAIN
    if nanoseconds >= _NANOSECONDS:
        seconds, nanoseconds = seconds + 1, 0
    return _TAI64N.pack(seconds, nanoseconds)
