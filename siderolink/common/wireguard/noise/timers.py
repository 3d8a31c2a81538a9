"""The timers of a peer (whitepaper, section 6), and the next deadline among many peers.

Every timer is a deadline in seconds on the engine's clock; NEVER if it is not set. The rules:

=================  =====================================================  ==========================================
timer              set when                                               what happens
=================  =====================================================  ==========================================
retransmit_at      an initiation was sent: 5 s and some jitter            it is sent again; after 90 s we give up
keepalive_at       data was received and nothing sent: 10 s                    an empty data message is sent
new_handshake_at   data was sent and nothing received: 15 s and some jitter   a new handshake begins
zero_keys_at       a session was derived, or we gave up: 540 s            all keys are erased
persistent_at      anything authenticated passed: the peer's interval     an empty data message is sent
=================  =====================================================  ==========================================
"""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

from .messages import KEEPALIVE_TIMEOUT, NEW_HANDSHAKE_TIME, REKEY_ATTEMPT_TIME, REKEY_TIMEOUT, ZERO_KEYS_TIME

if TYPE_CHECKING:
    from .output import Output
    from .peer import Peer

NEVER = float("inf")
ANSWER_SECONDS = 1.5
"""Seconds for which to send without an answer to a peer that another device may have taken over."""


class Timers:
    """The five deadlines of one peer. Methods are named after events; a jitter is seconds from 0 to a third."""

    __slots__ = (
        "_another_keepalive",
        "attempt_started_at",
        "jitter",
        "keepalive_at",
        "new_handshake_at",
        "persistent_at",
        "persistent_interval",
        "rekeyed_on_receive",
        "retransmit_at",
        "unanswered_since",
        "zero_keys_at",
    )

    def __init__(self) -> None:
        self.persistent_interval = 0
        self.jitter = 0.0
        """Seconds added to `new_handshake_at`; drawn once per session, because drawing for each packet costs too much."""
        self.clear()

    def clear(self) -> None:
        self.retransmit_at = NEVER
        self.keepalive_at = NEVER
        self.new_handshake_at = NEVER
        self.zero_keys_at = NEVER
        self.persistent_at = NEVER
        self.attempt_started_at = 0.0
        self.rekeyed_on_receive = False
        self.unanswered_since = NEVER
        self._another_keepalive = False

    def next_at(self) -> float:
        """The earliest deadline, or NEVER."""
        return min(self.retransmit_at, self.keepalive_at, self.new_handshake_at, self.zero_keys_at, self.persistent_at)

    def authenticated_sent(self, now: float) -> None:
        """We sent a message that the peer can authenticate: it serves as a keepalive."""
        self.keepalive_at = NEVER
        self._traversed(now)

    def data_sent(self, now: float) -> bool:
        """The same for data; returns True if this set a deadline that may be the next one."""
        self.keepalive_at = NEVER
        if self.persistent_interval:
            self.persistent_at = now + self.persistent_interval
        if self.new_handshake_at != NEVER:
            return False
        self.new_handshake_at = now + NEW_HANDSHAKE_TIME + self.jitter
        if self.unanswered_since == NEVER:
            self.unanswered_since = now
        return True

    def authenticated_received(self, now: float) -> None:
        """We received an authenticated message: the peer is alive."""
        self.new_handshake_at = self.unanswered_since = NEVER
        self._traversed(now)

    def data_received(self, now: float) -> bool:
        """The same for data; returns True if this set a deadline that may be the next one."""
        self.new_handshake_at = self.unanswered_since = NEVER
        if self.persistent_interval:
            self.persistent_at = now + self.persistent_interval
        if self.keepalive_at != NEVER:
            self._another_keepalive = True
            return False
        self.keepalive_at = now + KEEPALIVE_TIMEOUT
        return True

    def keepalive_expired(self, now: float) -> None:
        """The keepalive was sent; data received since the timer was set requires another one."""
        self.keepalive_at = NEVER
        if self._another_keepalive:
            self._another_keepalive = False
            self.keepalive_at = now + KEEPALIVE_TIMEOUT

    def initiation_sent(self, now: float, jitter: float) -> None:
        if self.retransmit_at == NEVER:
            self.attempt_started_at = now
        self.retransmit_at = min(now + REKEY_TIMEOUT + jitter, self.attempt_started_at + REKEY_ATTEMPT_TIME)
        if self.unanswered_since == NEVER:
            self.unanswered_since = now

    def initiation_postponed(self, now: float, at: float) -> None:
        """An initiation is due, but the last one was too recent."""
        if self.retransmit_at == NEVER:
            self.attempt_started_at = now
            self.retransmit_at = at

    def has_attempt_ended(self, now: float) -> bool:
        return now >= self.attempt_started_at + REKEY_ATTEMPT_TIME

    def attempt_abandoned(self, now: float) -> None:
        self.retransmit_at = NEVER
        self.keepalive_at = NEVER
        self._another_keepalive = False
        if self.zero_keys_at == NEVER:
            self.zero_keys_at = now + ZERO_KEYS_TIME

    def became_passive(self) -> None:
        """Stop sending; the keys are still erased in time."""
        zero_keys_at = self.zero_keys_at
        self.persistent_interval = 0
        self.clear()
        self.zero_keys_at = zero_keys_at

    def handshake_completed(self) -> None:
        self.retransmit_at = NEVER
        self.rekeyed_on_receive = False

    def session_derived(self, now: float, jitter: float) -> None:
        self.zero_keys_at = now + ZERO_KEYS_TIME
        self.jitter = jitter

    def persistent_expired(self, now: float) -> None:
        """Schedule the next one, even if this one could not be sent."""
        self.persistent_at = now + self.persistent_interval if self.persistent_interval else NEVER

    def _traversed(self, now: float) -> None:
        if self.persistent_interval:
            self.persistent_at = now + self.persistent_interval


class Tenure:
    """How long a device may assume that its peers have not moved to another device with the same key."""

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = NEVER

    def extend(self, seconds: float | None, now: float) -> None:
        """Extend the tenure to `seconds` from now; None means forever."""
        self.until = NEVER if seconds is None else now + seconds

    def doubts(self, timers: Timers, now: float) -> bool:
        """Whether another device may have the peer: the tenure is over, and the peer does not answer."""
        return now > self.until and now - timers.unanswered_since > ANSWER_SECONDS


class DeadlineQueue:
    """The peers by their next deadline.

    Deadlines mostly move later, with every packet. So the heap is lazy: an entry may be early, never late, and is corrected
    when it reaches the top. Updating a peer is cheap, and no cost depends on the number of peers.
    """

    __slots__ = ("_heap", "_order", "_output")

    def __init__(self, output: "Output") -> None:
        """Sets `output.is_waiting` when a deadline moves earlier, so that the owner arms its timer."""
        self._output = output
        self._heap: list[tuple[float, int, Peer]] = []
        self._order = count()

    def update(self, peer: "Peer") -> None:
        """Register the peer's next deadline; call this whenever one may have moved earlier."""
        at = peer.timers.next_at()
        if at < peer.scheduled_at:
            peer.scheduled_at = at
            heappush(self._heap, (at, next(self._order), peer))
            self._output.is_waiting = True

    def earliest(self) -> float:
        """A time before which nothing is due; cheaper than the exact one."""
        return self._heap[0][0] if self._heap else NEVER

    def next_at(self) -> float:
        """The exact next deadline of all peers, or NEVER."""
        heap = self._heap
        while heap:
            at, _, peer = heap[0]
            if at == peer.scheduled_at and at == peer.timers.next_at():
                return at
            self._correct(at, peer)
        return NEVER

    def due(self, now: float) -> Iterator["Peer"]:
        """The peers whose deadline has passed; the caller handles each and calls `update` before taking the next."""
        while self.next_at() <= now:
            peer = heappop(self._heap)[2]
            peer.scheduled_at = NEVER
            yield peer

    def _correct(self, at: float, peer: "Peer") -> None:
        heappop(self._heap)
        if at == peer.scheduled_at:
            peer.scheduled_at = NEVER
            self.update(peer)
