"""The WireGuard protocol of one device, without I/O: datagrams, packets and a clock in; datagrams, packets and events out.

Theory of operation. The owner passes batches of received datagrams (`receive`) and of packets to send (`seal`), and the time
(`handle_timers`). After each call it empties `output` and arms one timer for `next_deadline`. Nothing here opens a socket,
starts a task, reads a clock, draws entropy or chooses a cipher implementation: all of these are injected. `now` is in
seconds on a clock that also runs while the host sleeps; one engine always gets the same clock.

A packet for a peer without a usable session is *staged*; once there is a session the peer is *ready*, and the owner sends what
`Peer.take_staged` returns. The engine never inspects staged items, so an owner may stage anything that it sends.

`Exchange` creates sessions, `Traffic` uses them, and the engine connects both with configuration and time.
"""

from collections.abc import Callable, MutableMapping
from itertools import islice

from . import messages
from .exchange import Entropy, Exchange
from .handshake import NO_PRESHARED_KEY, Identity
from .output import Drop, HandshakeTimedOut, Output, PeerUnresponsive
from .peer import Path, Peer
from .primitives import is_low_order
from .rates import Rates
from .routing import CryptokeyRouting, InnerFilter
from .rows import CipherFactory, Datagrams, Opened
from .session import Session
from .tai64n import Timestamps
from .timers import ANSWER_SECONDS, NEVER, DeadlineQueue
from .traffic import Traffic

DEFAULT_MTU = 1420
_REPEAT_INTERVAL = 0.1
"""Seconds after an initiation during which further requests for a handshake by the same path refer to it."""


class Engine:
    """One private key and its peers.

    `entropy` returns random bytes, `unix_time_ns` the wall clock (only for handshake timestamps and reporting), `ciphers`
    the cipher of a session key. `timestamps` has the TAI64N high-water mark of a key that outlives the process. `peers` is
    where the engine keeps its peers by their keys, by default a dictionary.
    """

    def __init__(
        self,
        private_key: bytes,
        *,
        entropy: Entropy,
        unix_time_ns: Callable[[], int],
        ciphers: CipherFactory,
        mtu: int = DEFAULT_MTU,
        timestamps: Timestamps | None = None,
        peers: MutableMapping[bytes, Peer] | None = None,
    ) -> None:
        self.peers: MutableMapping[bytes, Peer] = {} if peers is None else peers
        self.allowed_ips = CryptokeyRouting()
        self.rates = Rates(self.peers)
        self.mtu = mtu
        self.output = Output()
        """The output of the last call; drain it after each call."""
        self.drop = self.output.drop
        """Counts a drop decided by the owner."""
        self.removed_received_bytes = self.removed_sent_bytes = 0
        """Traffic of removed peers."""
        self._deadlines = DeadlineQueue(self.output)
        self._exchange = Exchange(
            Identity.of(private_key),
            self.peers,
            self.output,
            entropy=entropy,
            unix_time_ns=unix_time_ns,
            ciphers=ciphers,
            timestamps=timestamps or Timestamps(),
        )
        self.tenure = self._exchange.tenure
        self._traffic = traffic = Traffic(
            self.allowed_ips,
            self._exchange.indices,
            self._deadlines,
            self.output,
            tenure=self.tenure,
            initiate=self.initiate,
            on_confirmed=self._confirmed,
        )
        self._turns = self._exchange.turns
        self.find_peer, self.can_send, self.is_silent = traffic.find_peer, traffic.can_send, traffic.is_silent
        self.accept, self.prepare = traffic.accept, traffic.prepare
        self.receive_keys = self._exchange.indices.receive_keys
        """By receiver index, for an owner that opens data messages itself before it passes them to `accept`."""
        self.seal, self.stage, self.send_keepalive = traffic.seal, traffic.stage, traffic.send_keepalive

    # Configuration

    @property
    def public_key(self) -> bytes:
        return self._exchange.identity.public

    @property
    def drops(self) -> dict[Drop, int]:
        """Number of drops by reason."""
        return self.output.drops

    def set_private_key(self, raw: bytes) -> None:
        """Replace the private key: all sessions end, and a peer with the same public key is removed."""
        self._exchange.rename(Identity.of(raw))
        self.remove_peer(self.public_key)
        for peer in self.peers.values():
            self._erase(peer)
            peer.static_static = None

    def add_peer(self, public_key: bytes, *, even_useless: bool = False) -> Peer:
        """The peer with this key, new if unknown. Raises ValueError for our own key, or low order unless `even_useless`."""
        peer = self.peers.get(public_key)
        if peer is None:
            if public_key == self.public_key:
                raise ValueError("a device cannot be its own peer")
            if is_low_order(public_key) and not even_useless:
                raise ValueError("it is a low-order point")
            peer = self.peers[public_key] = Peer(public_key)
            self.rates.adopt(peer)
        return peer

    def greet(self, peer: Peer, now: float) -> None:
        """Answer an initiation that a newly added peer sent just before."""
        kept = self._exchange.strangers.take(peer.public_key, now)
        if kept is not None:
            self._receive_handshake(messages.INITIATION, *kept, now)

    def remove_peer(self, public_key: bytes) -> None:
        """Remove a peer with its keys and prefixes; does nothing if it is unknown."""
        peer = self.peers.pop(public_key, None)
        if peer is None:
            return
        self.removed_received_bytes += peer.received_bytes
        self.removed_sent_bytes += peer.sent_bytes
        self.allowed_ips.set(peer, ())
        self._erase(peer)
        peer.timers.persistent_interval = 0
        peer.timers.clear()
        peer.take_staged()
        peer.path = None

    def set_preshared_key(self, peer: Peer, key: bytes | None) -> None:
        """Takes effect with the next handshake."""
        peer.preshared_key = key or NO_PRESHARED_KEY

    def set_persistent_keepalive(self, peer: Peer, seconds: int, now: float) -> None:
        """Change the interval. Enabling it sends a keepalive immediately."""
        was_off = not peer.timers.persistent_interval
        peer.timers.persistent_interval = seconds
        peer.timers.persistent_expired(now)
        if was_off and seconds:
            self.send_keepalive(peer, now)
        self._deadlines.update(peer)

    def set_passive(self, peer: Peer, is_passive: bool) -> None:
        """Make the peer passive: nothing is sent to it and it has no path, but its sessions stay for packets from it."""
        peer.is_passive = is_passive
        if is_passive:
            self._exchange.indices.abandon(peer)
            peer.timers.became_passive()
            peer.take_staged()
            peer.path = None

    # Packets and datagrams

    def send(self, packet: bytes, now: float) -> None:
        """Send one inner packet, for an owner without batches; its datagram is added to `output`."""
        self._traffic.send(packet, self.mtu, now)

    def receive(
        self, datagrams: Datagrams, path: Path, now: float, *, first: int = 0, count: int = 1
    ) -> tuple[Opened, InnerFilter] | None:
        """Process `count` datagrams from row `first` on; more than one only if all are data messages of one session.

        Returns decrypted packets, valid until the next call, and the filter that decides which of them may be passed on.
        """
        datagram = datagrams.row(first)
        receiver = messages.receiver_index(datagram)
        if receiver is not None:
            return self._traffic.open(datagrams, first, count, receiver, path, now)
        kind = messages.message_type(datagram)
        if kind == 0:
            self.output.drop(Drop.MALFORMED)
        else:
            self._receive_handshake(kind, bytes(datagram), path, now)
        return None

    def initiate(self, peer: Peer, now: float) -> None:
        """Start a handshake, at most once in 5 s."""
        self._exchange.initiate(peer, now)
        self._deadlines.update(peer)

    def handshake(self, peer: Peer, now: float) -> None:
        """Start a handshake even within 5 s of the last one; the owner limits the rate. Sessions stay valid."""
        path, sent = peer.path, peer.initiation
        is_elsewhere = path is not None and sent is not None and path.source != sent.destination
        if is_elsewhere or now - peer.last_initiation_sent_at > _REPEAT_INTERVAL:
            self._exchange.initiate(peer, now, at_once=True)
            self._deadlines.update(peer)

    # Time

    def next_deadline(self) -> float:
        """When `handle_timers` is due, on the caller's clock; infinity without a deadline."""
        return min(self._deadlines.next_at(), self._turns.due_at)

    def earliest_deadline(self) -> float:
        """Like `next_deadline`, but possibly too early, and cheaper. It moves earlier only when `output.is_waiting` is set."""
        return min(self._deadlines.earliest(), self._turns.due_at)

    def handle_timers(self, now: float, most: int | None = None) -> None:
        """Run the timers that are due, and continue with handshake messages that waited for their turn.

        The timers are those of `most` peers at most; others stay due.
        """
        while (waiting := self._turns.take(now)) is not None:
            kind, datagram, path = waiting
            if not path.is_open:  # its stream ended meanwhile: the peer must not return to it
                self.output.drop(Drop.NO_PATH)
                continue
            self._processed(self._exchange.process(kind, datagram, path, now), len(datagram), path, now)
        for peer in islice(self._deadlines.due(now), most):
            self._handle_due(peer, now)
            self._deadlines.update(peer)

    def stop(self) -> None:
        """Drop all sessions and staged packets, and do nothing until `start`: the interface is down."""
        self._exchange.is_stopped = True
        self._turns.clear()
        for peer in self.peers.values():
            self._erase(peer)
            peer.timers.clear()
            peer.take_staged()

    def start(self, now: float) -> None:
        """Resume. Starts handshakes with peers that have a persistent keepalive."""
        self._exchange.is_stopped = False
        for peer in self.peers.values():
            if peer.timers.persistent_interval:
                self.send_keepalive(peer, now)

    # Implementation

    def _receive_handshake(self, kind: int, datagram: bytes, path: Path, now: float) -> None:
        self._processed(self._exchange.receive(kind, datagram, path, now), len(datagram), path, now)

    def _processed(self, session: Session | None, size: int, path: Path, now: float) -> None:
        """Go on with the session that a handshake message of `size` bytes completed, if any."""
        if session is None:
            return
        peer = session.peer
        peer.timers.authenticated_received(now)
        if peer.is_passive:  # an initiation may be a replay, so it does not make the peer active
            peer.received_bytes += size
        else:
            self._traffic.heard(peer, path, size, now)
        if session.is_initiator:
            self._traffic.announce(peer)
            if not peer.staged:
                self.send_keepalive(peer, now)
        self._deadlines.update(peer)

    def _confirmed(self, peer: Peer, now: float) -> None:
        self._exchange.complete(peer, now)
        self._traffic.announce(peer)

    def _handle_due(self, peer: Peer, now: float) -> None:
        timers = peer.timers
        if timers.retransmit_at <= now:
            self._retransmit(peer, now)
        if timers.keepalive_at <= now:
            self.send_keepalive(peer, now)
            timers.keepalive_expired(now)
        if timers.new_handshake_at <= now:
            timers.new_handshake_at = NEVER
            self.output.announce(PeerUnresponsive(peer=peer))
            self._exchange.initiate(peer, now)
        if timers.zero_keys_at <= now:
            timers.zero_keys_at = NEVER
            self._erase(peer)
        if timers.persistent_at <= now:
            timers.persistent_expired(now)
            self.send_keepalive(peer, now)

    def _retransmit(self, peer: Peer, now: float) -> None:
        if self._exchange.tenure.doubts(peer.timers, now) and not peer.timers.has_attempt_ended(now):
            peer.timers.retransmit_at = now + ANSWER_SECONDS
            return
        if not peer.timers.has_attempt_ended(now):
            self.output.announce(PeerUnresponsive(peer=peer))
            self._exchange.initiate(peer, now)
            return
        peer.timers.attempt_abandoned(now)
        self._exchange.indices.abandon(peer)
        self.output.drop(Drop.HANDSHAKE_GAVE_UP, len(peer.take_staged()))
        self.output.announce(HandshakeTimedOut(peer=peer))

    def _erase(self, peer: Peer) -> None:
        self._exchange.indices.abandon(peer)
        self._exchange.indices.drop(peer.drop_sessions())
