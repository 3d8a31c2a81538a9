"""Handshake messages in both directions. A received one leads to a session, or to a drop that is counted by reason.

Checks are ordered by cost: length, mac1, load, then one Curve25519 exchange, the peer's key, and only then the rest.
"""

from collections.abc import Callable, Mapping

from . import messages
from .cookies import CookieBudget, LoadMeter, MacGuard, SourceLimiter
from .handshake import (
    Identity,
    ReceivedInitiation,
    SentInitiation,
    claim_initiation,
    consume_response,
    create_initiation,
    create_response,
    verify_initiation,
)
from .messages import REKEY_JITTER, REKEY_TIMEOUT
from .output import Drop, Output
from .peer import Path, Peer
from .primitives import dh
from .rows import CipherFactory
from .session import Session
from .tai64n import Timestamps
from .timers import Tenure
from .turns import COOKIE_COST, HANDSHAKE_COST, HandshakeTurns

Entropy = Callable[[int], bytes]

MIN_INITIATION_INTERVAL = 0.02
"""Minimum seconds between initiations of one peer; faster ones are dropped."""


STRANGER_SECONDS = 2.0
"""Seconds for which an initiation of an unknown key is kept, because another server may just have admitted the peer."""
MAX_STRANGERS = 256


class Strangers:
    """The last initiations of unknown keys, one per key; a new one replaces the oldest."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[bytes, tuple[float, bytes, Path]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, public_key: bytes, datagram: bytes, path: Path, now: float) -> None:
        self._kept.pop(public_key, None)
        if len(self._kept) >= MAX_STRANGERS:
            del self._kept[next(iter(self._kept))]
        self._kept[public_key] = now, datagram, path

    def take(self, public_key: bytes, now: float) -> tuple[bytes, Path] | None:
        """The initiation and its path; None if there is none or it is too old."""
        kept = self._kept.pop(public_key, None)
        return None if kept is None or now - kept[0] > STRANGER_SECONDS else kept[1:]


class Indices:
    """The receiver indices in messages to us: each identifies a session or an open initiation."""

    __slots__ = ("_entropy", "_pending", "_sessions", "receive_keys", "session")

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._sessions: dict[int, Session] = {}
        self.session: Callable[[int], Session | None] = self._sessions.get
        """The session with an index."""
        self.receive_keys: dict[int, bytes] = {}
        """The key that messages to an index are opened with."""
        self._pending: dict[int, Peer] = {}

    def fresh(self) -> int:
        """A random unused index."""
        while True:
            index = int.from_bytes(self._entropy(4), "little")
            if index not in self._sessions and index not in self._pending:
                return index

    def pending(self, index: int) -> Peer | None:
        return self._pending.get(index)

    def open(self, peer: Peer, sent: SentInitiation) -> None:
        """Register an initiation, replacing the peer's previous one."""
        self.abandon(peer)
        peer.initiation = sent
        self._pending[sent.index] = peer

    def abandon(self, peer: Peer) -> None:
        """Drop the peer's open initiation."""
        if peer.initiation is not None:
            self._pending.pop(peer.initiation.index, None)
            peer.initiation = None

    def add(self, session: Session) -> None:
        self._sessions[session.local_index] = session
        self.receive_keys[session.local_index] = session.keys.receive

    def drop(self, sessions: list[Session]) -> None:
        for session in sessions:
            self._sessions.pop(session.local_index, None)
            self.receive_keys.pop(session.local_index, None)


class Exchange:
    """The handshake side of an engine."""

    def __init__(
        self,
        identity: Identity,
        peers: Mapping[bytes, Peer],
        output: Output,
        *,
        entropy: Entropy,
        unix_time_ns: Callable[[], int],
        ciphers: CipherFactory,
        timestamps: Timestamps,
    ) -> None:
        self.identity = identity
        self.indices = Indices(entropy)
        self.timestamps = timestamps
        self.tenure = Tenure()
        self.is_stopped = False
        """No handshake starts while the interface is down."""
        self.load = LoadMeter()
        self.turns = HandshakeTurns()
        self.strangers = Strangers()
        self._peers = peers
        self._output = output
        self._entropy = entropy
        self._unix_time_ns = unix_time_ns
        self._ciphers = ciphers
        self._guard = MacGuard(identity.public, entropy)
        self._limiter = SourceLimiter(entropy)
        self._cookies = CookieBudget(entropy)

    def rename(self, identity: Identity) -> None:
        """Change the private key."""
        self.identity = identity
        self._guard = MacGuard(identity.public, self._entropy)

    def jitter(self) -> float:
        """Random seconds from 0 to a third."""
        return int.from_bytes(self._entropy(2), "little") / 0xFFFF * REKEY_JITTER

    def initiate(self, peer: Peer, now: float, *, at_once: bool = False) -> None:
        """Start a handshake; unless `at_once`, delay it to 5 s after the last attempt."""
        if self.is_stopped or peer.is_passive or self.tenure.doubts(peer.timers, now):
            return
        earliest = peer.last_initiation_sent_at + REKEY_TIMEOUT
        if now < earliest and not at_once:
            peer.timers.initiation_postponed(now, earliest)
            return
        peer.has_retried_with_cookie = False
        self._send_initiation(peer, now)

    def _send_initiation(self, peer: Peer, now: float) -> None:
        path = peer.reachable_path
        peer.last_initiation_sent_at = now
        peer.timers.authenticated_sent(now)
        peer.timers.initiation_sent(now, self.jitter())
        shared = self._static_static(peer)
        if path is None or not shared:
            self._output.drop(Drop.NO_PATH if path is None else Drop.USELESS_KEY)
            return
        stamp = self.timestamps.for_peer(peer.public_key, self._unix_time_ns())
        if stamp is None:
            self._output.drop(Drop.STAMP_AHEAD)
            return
        message, sent = create_initiation(
            self.identity, peer.public_key, shared, self.indices.fresh(), self._entropy(32), stamp
        )
        sent.destination = path.source
        self.indices.open(peer, sent)
        self._send(peer, path, peer.signer.sign(messages.encode_initiation(message), now))

    def receive(self, kind: int, datagram: bytes, path: Path, now: float) -> Session | None:
        """Process a handshake message whose length fits its type; returns the new session, if any.

        An initiation or response waits, to be processed by `process`, if there have been too many in this turn.
        """
        if kind == messages.COOKIE_REPLY:
            self._receive_cookie(datagram, now)
            return None
        if not self._guard.has_mac1(datagram):
            self._output.drop(Drop.BAD_MAC1)
            return None
        self.load.count(now)
        if self.turns.admits(now):
            return self.process(kind, datagram, path, now)
        may_wait = not self.turns.is_crowded or self._is_proven(datagram, path.source, now)
        if may_wait and self.turns.keep((kind, datagram, path)):
            self._output.is_waiting = True  # the owner arms a timer
        else:
            self._output.drop(Drop.RATE_LIMITED)
        return None

    def process(self, kind: int, datagram: bytes, path: Path, now: float) -> Session | None:
        """Process an initiation or response with a valid mac1; returns the new session, if any."""
        if not self._admits(datagram, path, now):
            return None
        self.turns.spend(HANDSHAKE_COST)
        if kind == messages.INITIATION:
            return self._receive_initiation(datagram, path, now)
        return self._receive_response(datagram, path, now)

    def _admits(self, datagram: bytes, path: Path, now: float) -> bool:
        """Under load, require a cookie.

        A response to our open initiation needs none: its index has 32 random bits, and an eavesdropper is limited by source.
        So a device that dials many peers receives their responses during a flood.
        """
        if not self.load.is_under_load(now):
            return True
        source = path.source
        is_proven = self._is_proven(datagram, source, now)
        limiter = self._limiter if is_proven else self._cookies
        if not limiter.allows(source, now):
            self._output.drop(Drop.RATE_LIMITED)
            self.turns.spend(COOKIE_COST)
            return False
        if not is_proven:
            self._output.drop(Drop.BAD_MAC2)
            self._output.send(path, self._guard.cookie_reply(datagram, source, now))
            self.turns.spend(COOKIE_COST)
        return is_proven

    def _is_proven(self, datagram: bytes, source: bytes, now: float) -> bool:
        """Whether the message has a cookie, or is a response to our open initiation."""
        return self._is_awaited(datagram) or self._guard.has_mac2(datagram, source, now)

    def _is_awaited(self, datagram: bytes) -> bool:
        is_response = messages.message_type(datagram) == messages.RESPONSE
        return is_response and self.indices.pending(messages.parse_response(datagram).receiver) is not None

    def _receive_initiation(self, datagram: bytes, path: Path, now: float) -> Session | None:
        """Answer an initiation; the session is used once the peer has used it."""
        claimed = claim_initiation(self.identity, messages.parse_initiation(datagram))
        if claimed is None:
            self._output.drop(Drop.BAD_HANDSHAKE)
            return None
        peer = self._peers.get(claimed.public_key)
        if peer is None:
            self._output.drop(Drop.UNKNOWN_PEER)
            self.strangers.keep(claimed.public_key, datagram, path, now)
            return None
        shared = self._static_static(peer)
        received = verify_initiation(claimed, shared) if shared else None
        reason = Drop.BAD_HANDSHAKE if received is None else self._refusal(peer, received, path, now)
        if reason is not None or received is None:
            self._output.drop(reason or Drop.BAD_HANDSHAKE)
            return None
        return self._respond(peer, received, path, now)

    def _refusal(self, peer: Peer, received: ReceivedInitiation, path: Path, now: float) -> Drop | None:
        if path.peer is not None and path.peer != peer.public_key:
            return Drop.WRONG_PATH
        if received.timestamp <= peer.last_timestamp:
            return Drop.REPLAYED_INITIATION
        if now - peer.last_initiation_received_at < MIN_INITIATION_INTERVAL:
            return Drop.INITIATION_FLOOD
        return None

    def _respond(self, peer: Peer, received: ReceivedInitiation, path: Path, now: float) -> Session | None:
        index = self.indices.fresh()
        try:
            message, keys = create_response(received, peer.public_key, peer.preshared_key, index, self._entropy(32))
        except ValueError:
            self._output.drop(Drop.BAD_HANDSHAKE)
            return None
        peer.last_timestamp = received.timestamp
        peer.last_initiation_received_at = now
        session = Session(
            peer, keys, self._ciphers, local_index=index, remote_index=received.sender, is_initiator=False, now=now
        )
        self._install(session, now)
        peer.timers.authenticated_sent(now)
        self._send(peer, path, peer.signer.sign(messages.encode_response(message), now))
        return session

    def _receive_response(self, datagram: bytes, path: Path, now: float) -> Session | None:
        """Complete a handshake that we initiated. The session is usable immediately."""
        message = messages.parse_response(datagram)
        peer = self.indices.pending(message.receiver)
        if peer is None or peer.initiation is None:
            self._output.drop(Drop.UNEXPECTED_RESPONSE)
            return None
        if path.peer is not None and path.peer != peer.public_key:
            self._output.drop(Drop.WRONG_PATH)
            return None
        keys = consume_response(self.identity, peer.initiation, message, peer.preshared_key)
        if keys is None:
            self._output.drop(Drop.BAD_HANDSHAKE)
            return None
        session = Session(
            peer, keys, self._ciphers, local_index=message.receiver, remote_index=message.sender, is_initiator=True, now=now
        )
        self.indices.abandon(peer)
        self._install(session, now)
        self.complete(peer, now)
        return session

    def _receive_cookie(self, datagram: bytes, now: float) -> None:
        """Store a cookie and retry the initiation with it.

        The whitepaper leaves the retry to the timer. Here it is immediate, but only once per timer, so that an attacker
        who sees our initiations (cookies are sealed under a public key) can cause only one more.
        """
        reply = messages.parse_cookie_reply(datagram)
        peer = self.indices.pending(reply.receiver)
        is_initiator = peer is not None
        if peer is None:
            session = self.indices.session(reply.receiver)
            peer = session.peer if session is not None else None
        if peer is None:
            self._output.drop(Drop.UNEXPECTED_RESPONSE)
        elif not peer.signer.store_cookie(reply, now, is_initiator=is_initiator):
            self._output.drop(Drop.BAD_COOKIE)
        elif is_initiator and not peer.has_retried_with_cookie:
            peer.has_retried_with_cookie = True
            self._send_initiation(peer, now)

    def complete(self, peer: Peer, now: float) -> None:
        """Note that both sides have completed the handshake."""
        peer.is_passive = False
        peer.timers.handshake_completed()
        peer.last_handshake_at = now
        peer.last_handshake_ns = self._unix_time_ns()

    def _send(self, peer: Peer, path: Path, datagram: bytes) -> None:
        peer.sent_bytes += len(datagram)
        self._output.send(path, datagram)

    def _static_static(self, peer: Peer) -> bytes:
        """The shared secret of both static keys; empty if the peer's key is a low-order point."""
        if peer.static_static is None:
            try:
                peer.static_static = dh(self.identity.private, peer.public_key)
            except ValueError:
                peer.static_static = b""
        return peer.static_static

    def _install(self, session: Session, now: float) -> None:
        self.indices.add(session)
        self.indices.drop(session.peer.install(session))
        session.peer.timers.session_derived(now, self.jitter())
