"""One pair of transport keys between two peers (whitepaper, section 5.4.6): its age, and which counters are spent."""

from typing import TYPE_CHECKING

from .handshake import SessionKeys
from .messages import (
    COUNTER_WINDOW,
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME,
    REKEY_ON_RECEIVE_TIME,
)
from .rows import CipherFactory, RowCipher
from .timers import NEVER

if TYPE_CHECKING:
    from .peer import Peer

_MASK = (1 << COUNTER_WINDOW) - 1


class ReplayWindow:
    """The sliding window that refuses a counter seen before (RFC 6479 for the idea).

    It is one integer: bit i represents the counter i below the newest, and a run of rising counters is one shift. Counters are
    unsigned 64-bit. Call `accept` only for datagrams with a valid tag.
    """

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
        """Mark a batch, in one operation if the counters are consecutive; None if all are accepted."""
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


def _rises_by_one(counters: list[int], first: int) -> bool:
    return counters == list(range(first, first + len(counters)))


class Session:
    """Send and receive keys, their counters, and their age. Created by the handshake, dropped by rotation or by time."""

    __slots__ = (
        "_ciphers",
        "_opener",
        "_sealer",
        "created_at",
        "expires_at",
        "is_initiator",
        "keys",
        "local_index",
        "peer",
        "rekey_at",
        "rekey_on_receive_at",
        "remote_index",
        "replay",
        "send_counter",
    )

    def __init__(
        self,
        peer: "Peer",
        keys: SessionKeys,
        ciphers: CipherFactory,
        *,
        local_index: int,
        remote_index: int,
        is_initiator: bool,
        now: float,
    ) -> None:
        self.peer = peer
        self._ciphers = ciphers
        self.keys = keys
        self.local_index = local_index
        self.remote_index = remote_index
        self.is_initiator = is_initiator
        self.created_at = now
        self.expires_at = now + REJECT_AFTER_TIME
        """When nothing may be sent or received under these keys any more; in the past once the counters are used up."""
        self.rekey_at = now + REKEY_AFTER_TIME if is_initiator else NEVER
        """When sending under these keys should start a handshake; only the initiator considers their age."""
        self.rekey_on_receive_at = now + REKEY_ON_RECEIVE_TIME if is_initiator else NEVER
        """The same for receiving, so that one-way traffic outlives the keys."""
        self.send_counter = 0
        self.replay = ReplayWindow()
        self._sealer: RowCipher | None = None
        self._opener: RowCipher | None = None

    @property
    def sealer(self) -> RowCipher:
        """The cipher for sending, made when first used: an idle peer keeps only keys."""
        if self._sealer is None:
            self._sealer = self._ciphers(self.keys.send)
        return self._sealer

    @property
    def opener(self) -> RowCipher:
        """The cipher for receiving, made when first used."""
        if self._opener is None:
            self._opener = self._ciphers(self.keys.receive)
        return self._opener

    def release_ciphers(self) -> None:
        """Free the state that only a busy session needs, about 2 KB per direction; a keepalive shows that this one is idle."""
        self._sealer = self._opener = None

    def is_expired(self, now: float) -> bool:
        """True once nothing may be sent or received under these keys."""
        return now >= self.expires_at

    def reserve(self, count: int, now: float) -> int | None:
        """Reserve `count` counters permanently; returns the first, or None when the keys are too old or exhausted."""
        if now >= self.expires_at:
            return None
        first = self.send_counter
        self.send_counter = after = first + count
        if after > REKEY_AFTER_MESSAGES:
            self.rekey_at = -NEVER
            if after >= REJECT_AFTER_MESSAGES:
                self.expires_at = -NEVER
                self.send_counter = REJECT_AFTER_MESSAGES
            if after > REJECT_AFTER_MESSAGES:
                return None
        return first

    def __repr__(self) -> str:
        role = "initiator" if self.is_initiator else "responder"
        return f"<Session {self.local_index:#010x} {role} sent={self.send_counter}>"
