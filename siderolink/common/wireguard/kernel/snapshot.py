"""Derives events of the kernel's peers from two polls, and schedules the next poll. No I/O; the time is passed in.

The kernel sends no events about handshakes, roaming or attempts given up. All three are derived from its counters:

- a handshake was completed if its time has changed;
- the peer has roamed if its endpoint has changed;
- attempts were given up if something that needs an answer has gone unanswered for as long as WireGuard tries: 10 s until a
  passive keepalive would have come, 5 s, then 90 s of handshakes. Keepalives need no answer and are recognized by their size.

A poll costs time in proportion to the number of peers, so polls are rationed: frequent while a handshake is expected, rare
otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from siderolink.common.wireguard.kernel.messages import PeerFacts

__all__ = ["Change", "GaveUp", "HandshakeSeen", "PeerView", "PollSchedule", "Roamed", "compare"]

KEEPALIVE_BYTES: Final = 32
_ANSWER_BYTES: Final = 92 + KEEPALIVE_BYTES
"""A handshake response and a passive keepalive: may follow the last packet received and need no answer themselves."""
GIVE_UP_AFTER: Final = 10.0 + 5.0 + 90.0


@dataclass(frozen=True, slots=True)
class HandshakeSeen:
    """A handshake was completed since the last poll."""


@dataclass(frozen=True, slots=True)
class Roamed:
    """The peer's endpoint has changed since the last poll."""

    old: bytes


@dataclass(frozen=True, slots=True)
class GaveUp:
    """WireGuard has stopped trying to reach the peer."""


Change = HandshakeSeen | Roamed | GaveUp


@dataclass(slots=True)
class PeerView:
    """One peer as last seen."""

    facts: PeerFacts
    last_received: float | None = None
    """Unix time of the poll that found more received bytes, or of a later handshake; late by one interval at most."""
    received_at: float | None = None
    """The same on the monotonic clock of `compare`, which measures silence."""
    sent_when_heard: int = 0
    heard_at: float = 0.0
    unanswered_at: float | None = None
    """When a poll first found that something that needs an answer was sent after the peer was last heard."""
    has_given_up: bool = False


def compare(view: PeerView, facts: PeerFacts, now: float, unix_now: float) -> Iterator[Change]:
    """Update a view and yield its events: roaming first, because a handshake proves the path by which it arrived."""
    old, view.facts = view.facts, facts
    if old.endpoint != facts.endpoint and facts.endpoint:
        yield Roamed(old.endpoint)
    if facts.received != old.received:
        view.last_received, view.received_at = unix_now, now
        view.heard_at, view.sent_when_heard = now, facts.sent
        view.unanswered_at, view.has_given_up = None, False
    if facts.handshake_ns != old.handshake_ns and facts.handshake_ns:
        view.last_received = max(view.last_received or 0.0, facts.handshake_ns / 1e9)
        if view.received_at is None:
            view.received_at = now
        yield HandshakeSeen()
    if facts.sent != old.sent and facts.received == old.received:
        yield from _unanswered(view, now)


def _unanswered(view: PeerView, now: float) -> Iterator[Change]:
    facts = view.facts
    if view.unanswered_at is None:
        wants_none = _ANSWER_BYTES
        if facts.keepalive:
            wants_none += KEEPALIVE_BYTES * (int((now - view.heard_at) // facts.keepalive) + 1)
        if facts.sent - view.sent_when_heard > wants_none:
            view.unanswered_at = now
    elif now - view.unanswered_at >= GIVE_UP_AFTER and not view.has_given_up:
        view.has_given_up = True
        yield GaveUp()


class PollSchedule:
    """When to poll the peers again. All times are of one monotonic clock."""

    SHARE: Final = 20
    """While a handshake is expected, a poll is followed by a pause of this many times its duration."""
    IDLE_SHARE: Final = 100
    IDLE: Final = 5.0
    """Seconds between polls when no handshake is expected; more if a poll is costly."""
    PATIENCE: Final = 15.0
    """Seconds for which a handshake is expected of a peer that was set, was offered a path, or sent a handshake message."""
    FIRST: Final = 0.02
    LONGEST: Final = 1.0
    ARRIVAL: Final = 0.1
    ARRIVAL_SHARE: Final = 100
    """While a peer of another server may arrive, a poll is followed by this part of the time since that became so."""
    FRESH_COST: Final = 0.05
    """Seconds: each query for a peer causes a poll, unless polls cost more than this."""

    def __init__(self, now: float) -> None:
        self.cost = 0.0
        """Processor time of this thread that the last poll took, in seconds."""
        self.looked_at = now
        self._expected: dict[bytes, float] = {}
        self._newest = now
        self._arriving: set[bytes] = set()
        self._arriving_since = now

    def expect(self, key: bytes, now: float) -> None:
        """Expect a handshake with this peer soon."""
        self._expected.pop(key, None)
        self._expected[key] = self._newest = now

    def settled(self, key: bytes) -> None:
        """Stop expecting a handshake: it was completed, or the peer was removed."""
        self._expected.pop(key, None)

    def await_arrival(self, key: bytes, is_awaited: bool, now: float) -> None:
        """Whether this peer may start a session at any time."""
        if not is_awaited:
            self._arriving.discard(key)
        elif key not in self._arriving:
            self._arriving.add(key)
            self._arriving_since = now

    def polled(self, cost: float, now: float) -> None:
        """Note the end of a poll."""
        self.cost = cost
        self.looked_at = now
        while self._expected:
            key, since = next(iter(self._expected.items()))
            if now - since < self.PATIENCE:
                break
            del self._expected[key]

    def next_at(self) -> float:
        """When the next poll is due."""
        pause = self.IDLE
        if self._arriving:
            pause = min(max(self.ARRIVAL, (self.looked_at - self._arriving_since) / self.ARRIVAL_SHARE), pause)
        if self._expected:
            age = max(0.0, self.looked_at - self._newest)
            pause = min(max(self.FIRST, age / 4), self.LONGEST, pause)
        return self.looked_at + max(pause, (self.SHARE if pause < self.IDLE else self.IDLE_SHARE) * self.cost)

    def is_fresh(self, began_at: float, now: float, *, is_part: bool = False) -> bool:
        """Whether a poll that began then is recent enough to answer a query now; `is_part` if others like it follow at once."""
        allowed = self.SHARE * self.cost if is_part or self.cost > self.FRESH_COST else 0.0
        return now - began_at <= allowed
