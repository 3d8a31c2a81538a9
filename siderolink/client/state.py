"""When a link counts as up or down: pure, the time is passed in.

A link is judged by its handshakes alone. WireGuard renews a session every 120 s while there is traffic, and the persistent
keepalive is traffic; so a handshake is at most 120 s old on a healthy link, and one that is 275 s old means it is dead.
"""

from enum import StrEnum

DOWN_AFTER = 275.0
"""Seconds since the last handshake: reject after 180, one retry of 5, attempts for 90."""
ATTEMPT_TIMEOUT = 10.0
"""Seconds a new way to the server gets for its first handshake: two initiations, the second 5 s after the first."""


class LinkState(StrEnum):
    """Where a link is in its life."""

    PROVISIONING = "provisioning"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    REESTABLISHING = "re-establishing"
    LEFT = "left"


class HandshakeWatch:
    """Watches one way to the server, from the moment `now` at which it was first tried."""

    def __init__(self, now: float, *, attempt_timeout: float = ATTEMPT_TIMEOUT, down_after: float = DOWN_AFTER) -> None:
        self._down_after = down_after
        self._handshake_at: float | None = None
        self._deadline = now + attempt_timeout

    @property
    def deadline(self) -> float:
        """When the link is down, unless a handshake completes before."""
        return self._deadline

    @property
    def is_up(self) -> bool:
        """Whether a handshake completed since, and the link was not found down after it."""
        return self._handshake_at is not None

    def handshake_completed(self, at: float) -> bool:
        """Note a handshake; True where it brings the link up."""
        came_up = self._handshake_at is None
        if self._handshake_at is None or at > self._handshake_at:
            self._handshake_at = at
            self._deadline = at + self._down_after
        return came_up

    def check(self, now: float) -> str | None:
        """Why the link is down at `now`; None where it is not."""
        if now < self._deadline:
            return None
        if self._handshake_at is None:
            return "no handshake"
        return f"no handshake for {now - self._handshake_at:.0f} s"
