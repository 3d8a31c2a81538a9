"""One pair of transport keys between two peers (whitepaper, section 5.4.6), and who may still use it."""

from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from .constants import (
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME,
    REKEY_ON_RECEIVE_TIME,
)
from .handshake import SessionKeys
from .messages import encode_transport_header
from .primitives import nonce
from .replay import ReplayWindow

if TYPE_CHECKING:
    from .peer import Peer


class Session:
    """Send and receive keys, their counters, and their age. Created by the handshake, dropped by rotation or by time."""

    __slots__ = (
        "_keys",
        "_opener",
        "_sealer",
        "created_at",
        "is_initiator",
        "local_index",
        "peer",
        "remote_index",
        "replay",
        "send_counter",
    )

    def __init__(
        self, peer: "Peer", keys: SessionKeys, *, local_index: int, remote_index: int, is_initiator: bool, now: float
    ) -> None:
        self.peer = peer
        self._keys = keys
        self.local_index = local_index
        self.remote_index = remote_index
        self.is_initiator = is_initiator
        self.created_at = now
        self.send_counter = 0
        self.replay = ReplayWindow()
        self._sealer: ChaCha20Poly1305 | None = None
        self._opener: ChaCha20Poly1305 | None = None

    @property
    def sealer(self) -> ChaCha20Poly1305:
        """The AEAD for sending, made when first used: an idle peer keeps bare keys."""
        if self._sealer is None:
            self._sealer = ChaCha20Poly1305(self._keys.send)
        return self._sealer

    @property
    def opener(self) -> ChaCha20Poly1305:
        """The AEAD for receiving, made when first used."""
        if self._opener is None:
            self._opener = ChaCha20Poly1305(self._keys.receive)
        return self._opener

    def rest(self) -> None:
        """Give back what only a busy session needs: two thousand bytes each way. A keepalive is the sign of one that is not."""
        self._sealer = self._opener = None

    def is_expired(self, now: float) -> bool:
        """True once nothing may be sent or received under these keys."""
        return now - self.created_at >= REJECT_AFTER_TIME or self.send_counter >= REJECT_AFTER_MESSAGES

    def wants_rekey(self, now: float) -> bool:
        """True when sending with these keys calls for new ones; by age only on the initiator's side."""
        aged = self.is_initiator and now - self.created_at >= REKEY_AFTER_TIME
        return aged or self.send_counter > REKEY_AFTER_MESSAGES

    def wants_rekey_on_receive(self, now: float) -> bool:
        """True when receiving under these keys calls for new ones, so that traffic one way does not end with them."""
        return self.is_initiator and now - self.created_at >= REKEY_ON_RECEIVE_TIME

    def reserve(self, count: int, now: float) -> int | None:
        """Take `count` counters, never to be given back; answers the first, or None when the keys are too old or used up."""
        first = self.send_counter
        if now - self.created_at >= REJECT_AFTER_TIME:
            return None
        if first + count > REJECT_AFTER_MESSAGES:
            self.send_counter = REJECT_AFTER_MESSAGES
            return None
        self.send_counter = first + count
        return first

    def seal(self, counter: int, plaintext: bytes | memoryview) -> bytes:
        """One whole data message, under a counter that was reserved for it."""
        aead = self._sealer or self.sealer
        sealed = encode_transport_header(self.remote_index, counter) + aead.encrypt(nonce(counter), plaintext, None)
        if not plaintext:
            self.rest()
        return sealed

    def open(self, counter: int, ciphertext: bytes) -> bytes:
        """The plaintext of one data message. Raises InvalidTag."""
        plaintext = (self._opener or self.opener).decrypt(nonce(counter), ciphertext, None)
        if not plaintext:
            self.rest()
        return plaintext

    def __repr__(self) -> str:
        role = "initiator" if self.is_initiator else "responder"
        return f"<Session {self.local_index:#010x} {role} sent={self.send_counter}>"
