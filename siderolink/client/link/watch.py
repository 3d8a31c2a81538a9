"""When a link counts as up, in doubt, or down: pure, the time is passed in.

A link is judged by its handshakes alone. WireGuard renews a session every 120 s while there is traffic, and the persistent
keepalive is traffic; so a handshake is at most 120 s old on a healthy link, and one that is 275 s old means it is dead.

Nobody has to wait that long. Whatever looks wrong puts the link *in doubt*: a handshake is begun at once and then every second,
and the first that completes ends the doubt. Fifteen that are lost in a row are no accident, also where a fifth of all datagrams
is lost each way: that happens once in five million doubts. So a healthy link is never declared down.
"""

DOWN_AFTER = 275.0
"""Seconds since the last handshake: reject after 180, one retry of 5, attempts for 90."""
ATTEMPT_TIMEOUT = 8.0
"""Seconds a new way to the server gets for its first handshake."""
FIRST_PROBE = 1.0
PROBE_GROWTH = 1.4
"""On a new way the next handshake is begun a second after the first, then later and later: the server may be slow."""
PROBE_LIMIT = 15
PROBE_INTERVAL = 1.0
ENDING_SECONDS = 3.0
"""A server that is being stopped may still answer handshakes for so long after it has ended its API."""
SILENT_AFTER = 60.0
"""Seconds without anything authenticated that put a link in doubt; both ends keep it alive every 25 s."""


class HandshakeWatch:
    """Watches one way to the server, from the moment `now` at which it was first tried (all times are seconds)."""

    def __init__(self, now: float, *, attempt_timeout: float = ATTEMPT_TIMEOUT, down_after: float = DOWN_AFTER) -> None:
        self._attempt_timeout = attempt_timeout
        self._down_after = down_after
        self._handshake_at: float | None = None
        self._down_at = now + attempt_timeout
        self._heard_at = now
        self._silent_at = float("inf")
        self._probe_at = now + FIRST_PROBE
        self._interval = FIRST_PROBE
        self._again: tuple[float, str] | None = None
        """When to doubt once more, and why."""
        self.suspicion: str | None = None
        """Why an established link is in doubt; None where it is not."""
        self.unanswered = 0
        """Handshakes begun since the doubt began."""

    @property
    def is_up(self) -> bool:
        """Whether a handshake completed since, and the link was not found down after it."""
        return self._handshake_at is not None

    @property
    def deadline(self) -> float:
        """When to `check` and `take_probe` next, unless something happens before."""
        again_at = float("inf") if self._again is None else self._again[0]
        return min(self._down_at, self._silent_at, self._probe_at, again_at)

    def handshake_completed(self, at: float) -> bool:
        """Note a handshake; True where it brings the link up."""
        came_up = self._handshake_at is None
        if self._handshake_at is None or at > self._handshake_at:
            self._handshake_at = at
            self._down_at = at + self._down_after
            self.suspicion, self.unanswered = None, 0
            self._probe_at = float("inf")
            self.heard(at)
        return came_up

    def heard(self, at: float) -> None:
        """Note that something authenticated came."""
        if self._handshake_at is not None and self.suspicion is None:
            self._heard_at = max(self._heard_at, at)
            self._silent_at = self._heard_at + SILENT_AFTER

    def answered(self, now: float) -> None:
        """Note that something came back that was sent during the doubt: its end, without a handshake."""
        if self._handshake_at is not None:
            self.suspicion, self.unanswered = None, 0
            self._down_at, self._probe_at = self._handshake_at + self._down_after, float("inf")
            self.heard(now)

    def suspect(self, now: float, reason: str) -> bool:
        """Something looks wrong with an established link; True where that is news."""
        if self._handshake_at is None or self.suspicion is not None:
            return False
        self.suspicion, self.unanswered = reason, 0
        self._silent_at = float("inf")
        self._probe_at, self._interval = now, PROBE_INTERVAL
        self._down_at = min(self._down_at, now + PROBE_LIMIT * PROBE_INTERVAL)
        return True

    def suspect_twice(self, now: float, reason: str) -> None:
        """Something looks wrong that a handshake right now does not disprove: begin another doubt after `ENDING_SECONDS`."""
        self.suspect(now, reason)
        if self._handshake_at is not None:
            self._again = now + ENDING_SECONDS, reason

    def slept(self, now: float) -> None:
        """The host slept: what should have happened meanwhile could not. The link has another chance."""
        if self._handshake_at is None:
            self._down_at = now + self._attempt_timeout
            self.probe_now(now)
            return
        self._down_at = max(self._down_at, now + PROBE_LIMIT * PROBE_INTERVAL)
        self.suspicion = None
        self.suspect(now, "the host slept")

    def probe_now(self, now: float) -> None:
        """There is reason to hope: begin the next handshake at once, if any is wanted."""
        if self._probe_at != float("inf"):
            self._probe_at = now

    def take_probe(self, now: float) -> bool:
        """Whether a handshake is to be begun now."""
        if now < self._probe_at:
            return False
        if self.suspicion is None:
            self._interval *= PROBE_GROWTH
        self._probe_at = now + self._interval
        self.unanswered += 1
        return True

    def check(self, now: float) -> str | None:
        """Why the link is down at `now`; None where it is not. Long silence is the beginning of a doubt."""
        if self._again is not None and now >= self._again[0]:
            self.suspect(*self._again)
            self._again = None
        if now >= self._silent_at:
            self.suspect(now, f"nothing was heard for {SILENT_AFTER:.0f} s")
        if now < self._down_at:
            return None
        if self._handshake_at is None:
            return "no handshake"
        if self.suspicion is not None:
            return f"{self.suspicion}, and {self.unanswered} handshakes went unanswered"
        return f"no handshake for {now - self._handshake_at:.0f} s"
