"""Event ids of the form that existing machines use: twenty characters that sort by the time they were made."""

import os
import struct
import threading
import time
from collections.abc import Callable

_ALPHABET = "0123456789abcdefghijklmnopqrstuv"
_ID_BITS = 96
_COUNTER_BITS = 24


class IdMaker:
    """Makes ids out of the seconds, five bytes that tell makers apart, and a counter: 12 bytes in base 32."""

    def __init__(self, clock: Callable[[], float] = time.time, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._clock = clock
        self._maker = entropy(5)
        self._counter = int.from_bytes(entropy(3))
        self._last = 0
        self._lock = threading.Lock()

    def next(self) -> str:
        """One more id; it sorts behind all before it, also where the clock was set back."""
        with self._lock:
            counter = (self._counter + 1) % (1 << _COUNTER_BITS)
            now = max(int(self._clock()), self._last)
            if counter < self._counter and now == self._last:
                now += 1  # the counter restarted within one second
            self._counter, self._last = counter, now
        packed = struct.pack(">I", now & 0xFFFFFFFF) + self._maker + counter.to_bytes(3)
        return _encode(packed)


def _encode(packed: bytes) -> str:
    bits = int.from_bytes(packed) << 4  # to a whole number of five-bit digits
    return "".join(_ALPHABET[bits >> shift & 31] for shift in range(_ID_BITS - 1, -1, -5))
