"""Bounds the work on handshake messages in one turn of the engine's owner: of a burst, most wait for later turns.

One read of a socket may contain a thousand initiations, and each takes some 100 to 350 µs, or 25 µs for a cookie. The cost is
counted instead of measured, because the engine reads no clock.
"""

from collections import deque

from .peer import Path
from .timers import NEVER

COOKIE_COST = 1
HANDSHAKE_COST = 8
TURN_COST = 128
"""The cost after which a turn ends: 16 handshakes or 128 cookies, some 3 ms."""
TURN_INTERVAL = 0.004
"""Seconds from the beginning of a turn to the next one, so at most 4,000 handshakes per second."""
MAX_WAITING = 4096
"""Messages of up to 148 bytes that wait; of more, only those with a proof that their source is genuine wait, too."""
MAX_PROVEN_WAITING = 8192
"""Room for these, so that a flood does not displace them; more are dropped."""

Waiting = tuple[int, bytes, Path]
"""A message's type, its datagram, and where it came from."""


class HandshakeTurns:
    """The handshake messages of one engine; the first that came is the first that is processed."""

    __slots__ = ("_began_at", "_left", "_waiting")

    def __init__(self) -> None:
        self._began_at = 0.0
        self._left = TURN_COST
        self._waiting: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def due_at(self) -> float:
        """When waiting messages may be processed; NEVER without any."""
        return self._began_at + TURN_INTERVAL if self._waiting else NEVER

    def spend(self, cost: int) -> None:
        self._left -= cost

    def admits(self, now: float) -> bool:
        """Whether a message that has just come may be processed now."""
        return not self._waiting and self._has_time(now)

    @property
    def is_crowded(self) -> bool:
        """Whether only proven messages may still wait."""
        return len(self._waiting) >= MAX_WAITING

    def keep(self, message: Waiting) -> bool:
        """Keep a message for a later turn; returns False if too many wait."""
        if len(self._waiting) >= MAX_WAITING + MAX_PROVEN_WAITING:
            return False
        self._waiting.append(message)
        return True

    def take(self, now: float) -> Waiting | None:
        """The next waiting message that may be processed now; None if there is none."""
        return self._waiting.popleft() if self._waiting and self._has_time(now) else None

    def clear(self) -> None:
        """Forget the messages that wait."""
        self._waiting.clear()

    def _has_time(self, now: float) -> bool:
        if now >= self._began_at + TURN_INTERVAL:  # compared like `due_at`
            self._began_at, self._left = now, TURN_COST
        return self._left > 0
