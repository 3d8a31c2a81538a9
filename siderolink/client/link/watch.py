"""Decides when a link is up, suspect or down. Pure: times are passed in, in seconds.

A link is judged by its handshakes alone. WireGuard renews a session every 120 s while there is traffic, and the persistent
keepalive is traffic; so a healthy link's last handshake is at most 120 s old, and a link whose last one is 275 s old is dead.

Failures are detected sooner than that. Any symptom makes the link *suspect*: a handshake is started at once and then every
second, and the first one that completes clears the suspicion. Fifteen consecutive losses are not chance: with 20 % loss each
way, they occur once in five million suspicions. So a healthy link is never declared down.
"""

DOWN_AFTER = 275.0
"""Seconds since the last handshake: reject after 180, one retry of 5, attempts for 90."""
ATTEMPT_TIMEOUT = 8.0
"""Time limit in seconds for the first handshake on a new route."""
FIRST_PROBE = 1.0
PROBE_GROWTH = 1.4
"""On a new route the second handshake starts a second after the first; then intervals grow, because the server may be slow."""
PROBE_LIMIT = 15
PROBE_INTERVAL = 1.0
ENDING_SECONDS = 3.0
"""A server that is being stopped may still answer handshakes for this long after its API ended."""
SILENT_AFTER = 35.0
"""Seconds without an authenticated packet that make a link suspect: most servers send a keepalive every 25 s."""
QUIET_SILENT_AFTER = 60.0
"""The same after a silence that proved harmless: this server sends no keepalives, or packets are lost."""


class HandshakeWatch:
    """Decides whether one route to the server works, from `now`, when it was first tried."""

    def __init__(self, now: float, *, attempt_timeout: float = ATTEMPT_TIMEOUT, down_after: float = DOWN_AFTER) -> None:
        self._attempt_timeout = attempt_timeout
        self._down_after = down_after
        self._handshake_at: float | None = None
        self._down_at = now + attempt_timeout
        self._heard_at = now
        self._silent_at = float("inf")
        self._probe_at = now + FIRST_PROBE
        self._interval = FIRST_PROBE
        self._silent_after = SILENT_AFTER
        self._is_silent = False
        self._again: tuple[float, str] | None = None
        """When to suspect the link again, and why."""
        self.suspicion: str | None = None
        """Why an established link is suspect; None if it is not."""
        self.unanswered = 0
        """Handshakes started since the suspicion."""

    @property
    def is_up(self) -> bool:
        """Whether a handshake completed and the link was not found down since."""
        return self._handshake_at is not None

    @property
    def deadline(self) -> float:
        """When to call `check` and `take_probe` next, unless something happens before."""
        again_at = float("inf") if self._again is None else self._again[0]
        return min(self._down_at, self._silent_at, self._probe_at, again_at)

    def handshake_completed(self, at: float) -> bool:
        """Note a handshake; returns True if it brings the link up."""
        came_up = self._handshake_at is None
        if self._handshake_at is None or at > self._handshake_at:
            self._handshake_at = at
            self._down_at = at + self._down_after
            self._clear_suspicion()
            self._probe_at = float("inf")
            self.heard(at)
        return came_up

    def heard(self, at: float) -> None:
        """Note that an authenticated packet arrived."""
        if self._handshake_at is not None and self.suspicion is None:
            self._heard_at = max(self._heard_at, at)
            self._silent_at = self._heard_at + self._silent_after

    def answered(self, now: float) -> None:
        """Note an answer to a packet that was sent under suspicion; it clears the suspicion without a handshake."""
        if self._handshake_at is not None:
            self._clear_suspicion()
            self._down_at, self._probe_at = self._handshake_at + self._down_after, float("inf")
            self.heard(now)

    def suspect(self, now: float, reason: str) -> bool:
        """Suspect an established link; returns True if it was not suspect before."""
        if self._handshake_at is None or self.suspicion is not None:
            return False
        self.suspicion, self.unanswered = reason, 0
        self._silent_at = float("inf")
        self._probe_at, self._interval = now, PROBE_INTERVAL
        self._down_at = min(self._down_at, now + PROBE_LIMIT * PROBE_INTERVAL)
        return True

    def suspect_at_once(self, now: float, reason: str) -> None:
        """Suspect an established link, or bring the next handshake forward if one is due anyway."""
        if not self.suspect(now, reason):
            self.probe_now(now)

    def suspect_twice(self, now: float, reason: str) -> None:
        """Note a symptom that one handshake does not disprove: suspect the link again after `ENDING_SECONDS`."""
        self.suspect(now, reason)
        if self._handshake_at is not None:
            self._again = now + ENDING_SECONDS, reason

    def slept(self, now: float) -> None:
        """Restart the deadlines after the host was asleep and no packet could arrive."""
        if self._handshake_at is None:
            self._down_at = now + self._attempt_timeout
            self.probe_now(now)
            return
        self._down_at = max(self._down_at, now + PROBE_LIMIT * PROBE_INTERVAL)
        self.suspicion = None
        self.suspect(now, "the host slept")

    def probe_now(self, now: float) -> None:
        """Start the handshake that is due immediately, because it is likely to succeed now."""
        if self._probe_at != float("inf"):
            self._probe_at = now

    def take_probe(self, now: float) -> bool:
        """Whether to begin a handshake now."""
        if now < self._probe_at:
            return False
        if self.suspicion is None:
            self._interval *= PROBE_GROWTH
        self._probe_at = now + self._interval
        self.unanswered += 1
        return True

    def check(self, now: float) -> str | None:
        """The reason why the link is down at `now`; None if it is not. A long silence makes it suspect."""
        if self._again is not None and now >= self._again[0]:
            self.suspect(*self._again)
            self._again = None
        if now >= self._silent_at:
            self._is_silent = self.suspect(now, f"nothing was heard for {self._silent_after:.0f} s")
        if now < self._down_at:
            return None
        if self._handshake_at is None:
            return "no handshake"
        if self.suspicion is not None:
            return f"{self.suspicion}, and {self.unanswered} handshakes went unanswered"
        return f"no handshake for {now - self._handshake_at:.0f} s"

    def _clear_suspicion(self) -> None:
        self.suspicion, self.unanswered = None, 0
        if self._is_silent:
            self._is_silent, self._silent_after = False, QUIET_SILENT_AFTER


class RegularCuts:
    """Detects connections that are cut at a regular age, as by a proxy's idle or stream timeout."""

    ENOUGH = 3
    TOLERANCE = 0.1
    SHORTEST = 5.0
    """Seconds; shorter connections were not cut by an idle timeout."""

    def __init__(self) -> None:
        self._ages: list[float] = []

    def note(self, age: float) -> float | None:
        """Note a cut at this age; returns the mean age if the last three were similar, else None."""
        self._ages = [*self._ages, age][-self.ENOUGH :]
        mean = sum(self._ages) / len(self._ages)
        alike = all(abs(age - mean) <= max(1.0, self.TOLERANCE * mean) for age in self._ages)
        return mean if len(self._ages) == self.ENOUGH and alike and mean >= self.SHORTEST else None
