"""The sliding window that refuses a counter seen before (whitepaper, section 5.4.6; RFC 6479 for the idea).

The window is one integer: bit i stands for the counter i below the newest. A run of rising counters is one shift.
"""

from .constants import COUNTER_WINDOW, REJECT_AFTER_MESSAGES

_MASK = (1 << COUNTER_WINDOW) - 1


class ReplayWindow:
    """Counters are unsigned 64-bit; `accept` only those of datagrams whose tag held."""

    __slots__ = ("_newest", "_seen")

    def __init__(self) -> None:
        self._newest = -1
        self._seen = 0

    def accept(self, counter: int) -> bool:
        """Mark the counter; False if it was marked before, is too old, or is past the protocol's last."""
        ahead = counter - self._newest
        if ahead > 0:
            if counter >= REJECT_AFTER_MESSAGES:
                return False
            self._newest = counter
            self._seen = ((self._seen << ahead) & _MASK) | 1 if ahead < COUNTER_WINDOW else 1
            return True
        if ahead <= -COUNTER_WINDOW:
            return False
        bit = 1 << -ahead
        if self._seen & bit:
            return False
        self._seen |= bit
        return True

    def accept_run(self, counters: list[int]) -> list[bool] | None:
        """Mark a batch in one operation where the counters rise by one; None when all are accepted."""
        count = len(counters)
        first, last = counters[0], counters[-1]
        gap = first - self._newest
        if gap > 0 and last - first == count - 1 and last < REJECT_AFTER_MESSAGES and _rises_by_one(counters, first):
            shift = gap - 1 + count
            ones = (1 << count) - 1
            self._seen = ((self._seen << shift) | ones) & _MASK if shift < COUNTER_WINDOW else ones & _MASK
            self._newest = last
            return None
        return [self.accept(counter) for counter in counters]

    def is_stale(self, counter: int) -> bool:
        """True if the counter could not be accepted now; cheap, for use before the tag is checked."""
        behind = self._newest - counter
        if behind < 0:
            return counter >= REJECT_AFTER_MESSAGES
        return behind >= COUNTER_WINDOW or bool(self._seen >> behind & 1)


def _rises_by_one(counters: list[int], first: int) -> bool:
    return counters == list(range(first, first + len(counters)))
