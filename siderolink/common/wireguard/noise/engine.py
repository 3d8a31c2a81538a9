"""The WireGuard protocol of one device, without I/O: datagrams, packets and a clock in; datagrams, packets and events out.

Theory of operation. The owner passes what it received (`receive`), what it wants sent (`send`, or `begin` for a batch that it
seals itself) and the time (`handle_timers`). After each verb it drains `datagrams_to_send`, `events` and `take_ready`, and arms
one timer for `next_deadline`. Nothing here opens a socket, starts a task, reads a clock or draws entropy by itself; `now` is
seconds on a clock that also runs while the host sleeps, and one engine always gets the same clock.

A packet for a peer without a usable session is *staged*; when a session comes the peer is *ready*, and the owner sends what
`Peer.take_staged` gives. The engine never looks into staged items, so an owner may stage whatever it sends.
"""

from collections.abc import Callable

from cryptography.exceptions import InvalidTag

from . import messages
from .drops import Drop
from .events import Event, HandshakeCompleted, HandshakeGaveUp, PathChanged, PeerSilent
from .exchange import Entropy, Exchange
from .handshake import NO_PRESHARED_KEY, Identity
from .inner import inner_header, padded_length
from .output import Output
from .peer import Path, Peer
from .primitives import is_low_order
from .routing import CryptokeyRouting
from .schedule import Schedule
from .session import Session
from .tai64n import Timestamps
from .timers import NEVER

DEFAULT_MTU = 1420
_JUST_BEGUN = 0.1  # seconds: who asks for a handshake so short after the last one means that


class Engine:
    """One private key and its peers.

    `entropy` gives random bytes, `unix_time_ns` the wall clock (only for handshake timestamps and for reporting).
    `timestamps` carries the TAI64N high-water mark of a key that outlives the process.
    """

    def __init__(
        self,
        private_key: bytes,
        *,
        entropy: Entropy,
        unix_time_ns: Callable[[], int],
        mtu: int = DEFAULT_MTU,
        timestamps: Timestamps | None = None,
    ) -> None:
        self.peers: dict[bytes, Peer] = {}
        self.allowed_ips = CryptokeyRouting()
        self.mtu = mtu
        self._output = Output()
        self._schedule = Schedule()
        self._exchange = Exchange(
            Identity.of(private_key),
            self.peers,
            self._output,
            entropy=entropy,
            unix_time_ns=unix_time_ns,
            timestamps=timestamps or Timestamps(),
        )

    # Configuration

    @property
    def public_key(self) -> bytes:
        return self._exchange.identity.public

    @property
    def drops(self) -> dict[Drop, int]:
        """How often each reason to drop something came up."""
        return self._output.drops

    def drop(self, reason: Drop, count: int = 1) -> None:
        """Count a drop that the owner decided on."""
        self._output.drop(reason, count)

    def set_private_key(self, raw: bytes) -> None:
        """Become another identity: a peer of the same public key is removed, all sessions end."""
        self._exchange.rename(Identity.of(raw))
        self.remove_peer(self.public_key)
        for peer in self.peers.values():
            self._erase(peer)
            peer.static_static = None

    def add_peer(self, public_key: bytes, *, even_useless: bool = False) -> Peer:
        """The peer of this key, new if unknown. Raises ValueError for our own key or, unless `even_useless`, of low order."""
        peer = self.peers.get(public_key)
        if peer is None:
            if public_key == self.public_key:
                raise ValueError("a device cannot be its own peer")
            if is_low_order(public_key) and not even_useless:
                raise ValueError("it is a point of low order")
            peer = self.peers[public_key] = Peer(public_key)
        return peer

    def remove_peer(self, public_key: bytes) -> None:
        """Forget a peer with its keys and prefixes; nothing happens if it is unknown."""
        peer = self.peers.pop(public_key, None)
        if peer is None:
            return
        self.allowed_ips.set(peer, ())
        self._erase(peer)
        peer.timers.persistent_interval = 0
        peer.timers.clear()
        peer.take_staged()
        peer.path = None

    def set_preshared_key(self, peer: Peer, key: bytes | None) -> None:
        """Take effect with the next handshake."""
        peer.preshared_key = key or NO_PRESHARED_KEY

    def set_persistent_keepalive(self, peer: Peer, seconds: int, now: float) -> None:
        """Change the interval; turning it on sends a keepalive at once."""
        was_off = not peer.timers.persistent_interval
        peer.timers.persistent_interval = seconds
        peer.timers.persistent_expired(now)
        if was_off and seconds:
            self.send_keepalive(peer, now)
        self._schedule.update(peer)

    # Packets out

    def find_peer(self, source: bytes, destination: bytes) -> Peer | None:
        """The peer that a packet from the interface goes to; None, and counted, if it may not go anywhere."""
        found = self.allowed_ips.outbound(source, destination)
        if isinstance(found, Drop):
            self._output.drop(found)
            return None
        return found

    def can_send(self, peer: Peer, now: float) -> bool:
        """True if `begin` would answer a session; if not, a packet has to be staged."""
        session = peer.current
        return session is not None and peer.reachable_path is not None and not session.is_expired(now)

    def begin(self, peer: Peer, count: int, size: int, now: float) -> tuple[Session, int, Path] | None:
        """Reserve counters for `count` data messages of `size` bytes in all, that the caller now seals and sends.

        Answers the session, the first counter and the path; or None where there is no session to use: then the caller stages.
        """
        session, path = peer.current, peer.path
        if session is None or path is None or not path.is_open:
            return None
        first = session.reserve(count, now)
        if first is None:
            return None
        peer.sent_bytes += size
        if peer.timers.data_sent(now):
            self._schedule.update(peer)
        if session.wants_rekey(now):
            self.initiate(peer, now)
        return session, first, path

    def stage(self, peer: Peer, item: bytes, now: float) -> None:
        """Keep an item until the peer is ready, and begin a handshake; dropped where there is nowhere to send one."""
        if peer.reachable_path is None:
            self._output.drop(Drop.NO_PATH)
            return
        self._output.drop(Drop.STAGED_OVERFLOW, peer.stage(item))
        self.initiate(peer, now)

    def send(self, packet: bytes, now: float) -> None:
        """Send one inner packet, the plain way: routed, sealed and put among the datagrams to send, or staged."""
        header = inner_header(packet)
        if header is None or header.length != len(packet):
            self._output.drop(Drop.OUTBOUND_MALFORMED)
            return
        peer = self.find_peer(header.source, header.destination)
        if peer is None:
            return
        padded = padded_length(len(packet), self.mtu)
        begun = self.begin(peer, 1, padded + messages.TRANSPORT_OVERHEAD, now)
        if begun is None:
            self.stage(peer, packet, now)
            return
        session, counter, path = begun
        self._output.datagrams.append((path, session.seal(counter, packet + bytes(padded - len(packet)))))

    def send_keepalive(self, peer: Peer, now: float) -> None:
        """Send an empty data message, or begin a handshake where there is no session."""
        session, path = peer.current, peer.reachable_path
        if path is None:
            return
        counter = None if session is None else session.reserve(1, now)
        if session is None or counter is None:
            self.initiate(peer, now)
            return
        self._output.send(peer, path, session.seal(counter, b""))
        peer.timers.authenticated_sent(now)
        if session.wants_rekey(now):
            self._exchange.initiate(peer, now)
        self._schedule.update(peer)

    def initiate(self, peer: Peer, now: float) -> None:
        """Begin a handshake; never more than one in 5 s."""
        self._exchange.initiate(peer, now)
        self._schedule.update(peer)

    def handshake(self, peer: Peer, now: float) -> None:
        """Begin a handshake although the last one may be less than 5 s ago; the owner bounds how often. Sessions stay good."""
        if now - peer.last_initiation_sent_at > _JUST_BEGUN:
            self._exchange.initiate(peer, now, at_once=True)
            self._schedule.update(peer)

    # Datagrams in

    def session(self, index: int) -> Session | None:
        """The session that a data message names, for a caller that opens batches itself."""
        return self._exchange.indices.session(index)

    def receive(self, datagram: bytes, path: Path, now: float) -> bytes | None:
        """Take one datagram. Answers an inner packet that may be passed on, or None."""
        kind = messages.message_type(datagram)
        if kind == messages.TRANSPORT:
            return self._receive_transport(datagram, path, now)
        if kind == messages.COOKIE_REPLY:
            self._exchange.receive_cookie(datagram, now)
        elif kind == 0:
            self._output.drop(Drop.MALFORMED)
        elif self._exchange.admits(datagram, path, now):
            self._receive_handshake(kind, datagram, path, now)
        return None

    def session_refusal(self, session: Session | None, path: Path, now: float) -> Drop | None:
        """Why data messages of this session that came by this path are not even opened, or None."""
        if session is None:
            return Drop.UNKNOWN_RECEIVER
        if path.peer is not None and path.peer != session.peer.public_key:
            return Drop.WRONG_PATH
        return Drop.EXPIRED_SESSION if session.is_expired(now) else None

    def opened(self, session: Session, path: Path, size: int, now: float, *, has_data: bool) -> None:
        """Note that data messages of `size` bytes in all were authenticated and are no replay."""
        peer = session.peer
        if session is peer.next:
            self._exchange.indices.drop(peer.confirm(now))
            self._completed(peer, now)
        timers = peer.timers
        if not has_data:
            timers.authenticated_received(now)
        elif timers.data_received(now):
            self._schedule.update(peer)
        self._heard(peer, path, size, now)
        if session is peer.current and session.wants_rekey_on_receive(now) and not timers.rekeyed_on_receive:
            timers.rekeyed_on_receive = True
            self.initiate(peer, now)

    # Time

    def next_deadline(self) -> float:
        """When `handle_timers` is due, on the caller's clock; infinity for never."""
        return self._schedule.next_at()

    def earliest_deadline(self) -> float:
        """Like `next_deadline`, but perhaps too early, and so cheap that it may be asked after every packet."""
        return self._schedule.earliest()

    def handle_timers(self, now: float) -> None:
        """Do what is due."""
        for peer in self._schedule.due(now):
            self._handle_due(peer, now)
            self._schedule.update(peer)

    def stop(self) -> None:
        """Forget all sessions and what waits for them, and do nothing until `start`: the interface is down."""
        self._exchange.is_stopped = True
        for peer in self.peers.values():
            self._erase(peer)
            peer.timers.clear()
            peer.take_staged()

    def start(self, now: float) -> None:
        """Go on; peers with a persistent keepalive are dialled at once."""
        self._exchange.is_stopped = False
        for peer in self.peers.values():
            if peer.timers.persistent_interval:
                self.send_keepalive(peer, now)

    # What comes out

    @property
    def has_output(self) -> bool:
        """Whether there is anything to take from here."""
        output = self._output
        return bool(output.datagrams or output.events or output.ready)

    def datagrams_to_send(self) -> list[tuple[Path, bytes]]:
        """Handshake messages, keepalives, and data sealed one by one; emptied by the call."""
        datagrams, self._output.datagrams = self._output.datagrams, []
        return datagrams

    def events(self) -> list[Event]:
        """What has happened; emptied by the call."""
        events, self._output.events = self._output.events, []
        return events

    def take_ready(self) -> list[Peer]:
        """Peers whose staged items can be sent now; emptied by the call."""
        ready, self._output.ready = self._output.ready, []
        return ready

    # Inside

    def _receive_handshake(self, kind: int, datagram: bytes, path: Path, now: float) -> None:
        if kind == messages.INITIATION:
            session = self._exchange.receive_initiation(datagram, path, now)
        else:
            session = self._exchange.receive_response(datagram, path, now)
        if session is None:
            return
        peer = session.peer
        peer.timers.authenticated_received(now)
        self._heard(peer, path, len(datagram), now)
        if session.is_initiator:
            self._announce(peer)
            if not peer.staged:
                self.send_keepalive(peer, now)
        self._schedule.update(peer)

    def _receive_transport(self, datagram: bytes, path: Path, now: float) -> bytes | None:
        index, counter = messages.parse_transport(datagram)
        session = self._exchange.indices.session(index)
        refusal = self.session_refusal(session, path, now)
        if refusal is not None or session is None:
            self._output.drop(refusal or Drop.UNKNOWN_RECEIVER)
            return None
        try:
            packet = session.open(counter, datagram[messages.TRANSPORT_HEADER_BYTES :])
        except InvalidTag:
            self._output.drop(Drop.BAD_TAG)
            return None
        if not session.replay.accept(counter):
            self._output.drop(Drop.REPLAYED)
            return None
        self.opened(session, path, len(datagram), now, has_data=bool(packet))
        return self._admit(session.peer, packet) if packet else None

    def _admit(self, peer: Peer, packet: bytes) -> bytes | None:
        header = inner_header(packet)
        if header is None:
            self._output.drop(Drop.INNER_MALFORMED)
            return None
        refusal = self.allowed_ips.inbound_refusal(peer, header.source, header.destination)
        if refusal is not None:
            self._output.drop(refusal)
            return None
        return packet[: header.length]

    def _heard(self, peer: Peer, path: Path, size: int, now: float) -> None:
        peer.received_bytes += size
        peer.last_received_at = now
        if path is not peer.path:
            old, peer.path = peer.path, path
            if old != path:
                self._output.events.append(PathChanged(peer=peer, old=old, new=path))

    def _completed(self, peer: Peer, now: float) -> None:
        self._exchange.complete(peer, now)
        self._announce(peer)

    def _announce(self, peer: Peer) -> None:
        self._output.events.append(HandshakeCompleted(peer=peer))
        if peer.staged:
            self._output.ready.append(peer)

    def _handle_due(self, peer: Peer, now: float) -> None:
        timers = peer.timers
        if timers.retransmit_at <= now:
            self._retransmit(peer, now)
        if timers.keepalive_at <= now:
            self.send_keepalive(peer, now)
            timers.keepalive_expired(now)
        if timers.new_handshake_at <= now:
            timers.new_handshake_at = NEVER
            self._output.events.append(PeerSilent(peer=peer))
            self._exchange.initiate(peer, now)
        if timers.zero_keys_at <= now:
            timers.zero_keys_at = NEVER
            self._erase(peer)
        if timers.persistent_at <= now:
            timers.persistent_expired(now)
            self.send_keepalive(peer, now)

    def _retransmit(self, peer: Peer, now: float) -> None:
        if not peer.timers.has_attempt_ended(now):
            self._output.events.append(PeerSilent(peer=peer))
            self._exchange.initiate(peer, now)
            return
        peer.timers.attempt_abandoned(now)
        self._exchange.indices.abandon(peer)
        self._output.drop(Drop.HANDSHAKE_GAVE_UP, len(peer.take_staged()))
        self._output.events.append(HandshakeGaveUp(peer=peer))

    def _erase(self, peer: Peer) -> None:
        self._exchange.indices.abandon(peer)
        self._exchange.indices.drop(peer.drop_sessions())
