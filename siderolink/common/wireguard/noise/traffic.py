"""Data messages (whitepaper, section 5.4.6): sealed for a peer's path and opened from one, always in batches of one session."""

from collections.abc import Callable, Sequence
from functools import partial

from .exchange import Indices
from .messages import TRANSPORT_OVERHEAD
from .output import Drop, Output, PeerRoamed, SessionEstablished
from .peer import Path, Peer
from .rates import Buckets, rows_within, tightest
from .routing import CryptokeyRouting, InnerFilter, inner_header, padded_length
from .rows import Addresses, Datagrams, Opened, OpenedText, Packets, ToSeal
from .session import Session
from .timers import DeadlineQueue, Tenure

Initiate = Callable[[Peer, float], None]


class Traffic:
    """The data side of an engine: every packet in either direction passes through `seal` or `open`."""

    def __init__(
        self,
        routing: CryptokeyRouting,
        indices: Indices,
        deadlines: DeadlineQueue,
        output: Output,
        *,
        tenure: Tenure,
        initiate: Initiate,
        on_confirmed: Initiate,
    ) -> None:
        """`initiate` starts a handshake; `on_confirmed` is called when a peer first uses a session that it initiated."""
        self._routing = routing
        self._indices = indices
        self._deadlines = deadlines
        self._output = output
        self._tenure = tenure
        self._initiate = initiate
        self._on_confirmed = on_confirmed

    # Out

    def find_peer(self, source: bytes, destination: bytes) -> Peer | None:
        """The peer of a packet from the interface; None, with the drop counted, if there is none."""
        routing = self._routing
        if routing.only_to is None or source in routing.only_to:
            peer = routing.host(destination) or routing.lookup(destination)
            if peer is not None:
                return peer
        found = routing.outbound(source, destination)
        if isinstance(found, Drop):
            self._output.drop(found)
            return None
        return found

    def can_send(self, peer: Peer, now: float) -> bool:
        """Whether `seal` has a session to use; otherwise packets must be staged."""
        session, path = peer.current, peer.path
        return session is not None and path is not None and path.is_open and now < session.expires_at

    def is_silent(self, peer: Peer, now: float) -> bool:
        """Whether nothing may be sent to the peer, because another device has it or may have it."""
        tenure = self._tenure
        return peer.is_passive or (now > tenure.until and tenure.doubts(peer.timers, now))

    def seal(self, peer: Peer, packets: Packets, now: float) -> tuple[Path, Datagrams] | None:
        """Create one data message per packet, for the returned path. The caller sends them before its next call.

        Returns None without a usable session; the caller then stages the packets.
        """
        session, path = peer.current, peer.path
        if session is None or path is None or not path.is_open:
            return None
        count = packets.count
        counter = session.reserve(count, now)
        if counter is None:
            return None
        peer.sent_bytes += packets.size + count * TRANSPORT_OVERHEAD
        timers = peer.timers
        if timers.data_sent(now) and timers.new_handshake_at < peer.scheduled_at:
            self._deadlines.update(peer)
        if now >= session.rekey_at:
            self._initiate(peer, now)
        return path, session.sealer.seal(packets, session.remote_index, counter, path.headroom)

    def prepare(self, addresses: Addresses, start: int, length: int, now: float) -> tuple[Path, ToSeal] | None:
        """Reserve what one padded packet is sealed with; the caller seals it, and sends it by the path, before its next call.

        None, with nothing changed, for a packet that cannot or may not simply be sent: the caller finds out why by `find_peer`.
        """
        source, destination = addresses
        routing = self._routing
        peer = routing.host(destination) or routing.lookup(destination)
        if peer is None or peer.outbound_rates is not None or peer.is_passive or now > self._tenure.until:
            return None
        if routing.only_to is not None and source not in routing.only_to:
            return None
        session, path = peer.current, peer.path
        if session is None or path is None or not path.is_open or path.source.startswith(destination):
            return None
        counter = session.reserve(1, now)
        if counter is None:
            return None
        peer.sent_bytes += length + TRANSPORT_OVERHEAD
        timers = peer.timers
        if timers.data_sent(now) and timers.new_handshake_at < peer.scheduled_at:
            self._deadlines.update(peer)
        if now >= session.rekey_at:
            self._initiate(peer, now)
        return path, (session.keys.send, start, length, session.remote_index, counter)

    def stage(self, peer: Peer, item: bytes, now: float) -> None:
        """Queue an item until the peer is ready, and start a handshake. Drops the item if the peer has no endpoint."""
        if peer.reachable_path is None:
            self._output.drop(Drop.NO_PATH)
            return
        self._output.drop(Drop.STAGED_OVERFLOW, peer.stage(item))
        self._initiate(peer, now)

    def send(self, packet: bytes, mtu: int, now: float) -> None:
        """Route one inner packet and pad it; queue the sealed datagram, or stage the packet."""
        header = inner_header(packet)
        if header is None or header[1] != len(packet):
            self._output.drop(Drop.OUTBOUND_MALFORMED)
            return
        pair = header[0]
        half = len(pair) // 2
        peer = self.find_peer(pair[:half], pair[half:])
        if peer is None:
            return
        if self.is_silent(peer, now):
            self._output.drop(Drop.NO_PATH)
            return
        padding = padded_length(len(packet), mtu) - len(packet)
        sealed = self.seal(peer, Packets.single(memoryview(packet + bytes(padding))), now)
        if sealed is None:
            self.stage(peer, packet, now)
        else:
            path, datagrams = sealed
            self._output.send(path, bytes(datagrams.row(0)))

    def send_keepalive(self, peer: Peer, now: float) -> None:
        """Send an empty data message, or start a handshake if there is no session."""
        session, path = peer.current, peer.reachable_path
        if path is None or self.is_silent(peer, now):
            return
        counter = None if session is None else session.reserve(1, now)
        if session is None or counter is None:
            self._initiate(peer, now)
            return
        sealed = session.sealer.seal(Packets.single(memoryview(b"")), session.remote_index, counter, path.headroom)
        session.release_ciphers()
        peer.sent_bytes += TRANSPORT_OVERHEAD
        self._output.send(path, bytes(sealed.row(0)))
        peer.timers.authenticated_sent(now)
        if now >= session.rekey_at:
            self._initiate(peer, now)
        self._deadlines.update(peer)

    # In

    def open(
        self, datagrams: Datagrams, first: int, count: int, receiver: int, path: Path, now: float
    ) -> tuple[Opened, InnerFilter] | None:
        """Decrypt `count` data messages to one receiver index, from row `first` on; None if none of them is accepted.

        Rows with a bad tag or a used counter are marked as invalid. The filter decides about the inner packets of the others.
        """
        session = self._indices.session(receiver)
        refusal = _session_refusal(session, path, now)
        if refusal is not None or session is None:
            self._output.drop(refusal or Drop.UNKNOWN_RECEIVER, count)
            return None
        opened = session.opener.open(datagrams, first, count)
        accepted = self._accept(opened, session)
        if not accepted:
            return None
        size = opened.size + count * TRANSPORT_OVERHEAD
        has_data = opened.length > 0 and (opened.last > 0 or any(opened.good[:-1]))
        self._accepted(session, path, size if accepted == count else size * accepted // count, now, has_data=has_data)
        if session.peer.inbound_rates is not None and has_data:
            self._limit(opened, session.peer.inbound_rates, now)
        return opened, InnerFilter(partial(self._routing.inbound_refusal, session.peer), self._output.drop)

    def accept(self, messages: Sequence[tuple[Path, int, OpenedText]], now: float) -> list[tuple[int, int]]:
        """Process data messages of many sessions that were opened with `receive_keys`; each is given by path, size and text.

        Returns start and end of the inner packets that may be passed on.
        """
        find = self._indices.session
        passed: list[tuple[int, int]] = []
        for path, size, (receiver, counter, addresses, start, end) in messages:
            session = find(receiver)
            if session is None or path.peer is not None or now >= session.expires_at:
                refusal = _session_refusal(session, path, now)
                if refusal is not None or session is None:
                    self._output.drop(refusal or Drop.UNKNOWN_RECEIVER)
                    continue
            if counter is None:
                self._output.drop(Drop.BAD_TAG)
            elif not session.replay.accept(counter):
                self._output.drop(Drop.REPLAYED)
            else:
                length = size - TRANSPORT_OVERHEAD
                self._accepted(session, path, size, now, has_data=length > 0)
                if length and self._may_pass(session.peer, addresses, length, now):
                    passed.append((start, end))
        return passed

    def _may_pass(self, peer: Peer, addresses: Addresses | None, length: int, now: float) -> bool:
        """Whether one inner packet may be passed on; otherwise the drop is counted."""
        refusal: Drop | None
        if peer.inbound_rates is not None and not rows_within(peer.inbound_rates, length, 1, length, now):
            refusal = tightest(peer.inbound_rates).reason
        elif addresses is None:
            refusal = Drop.INNER_MALFORMED
        else:
            refusal = self._routing.inbound_refusal(peer, *addresses)
        if refusal is None:
            return True
        self._output.drop(refusal)
        return False

    def _limit(self, opened: Opened, buckets: Buckets, now: float) -> None:
        """Exclude the rows that exceed the peer's bandwidth limit."""
        fitting = rows_within(buckets, opened.length, opened.count, opened.last, now)
        if fitting < opened.count:
            self._output.drop(tightest(buckets).reason, opened.good[fitting:].count(True))
            opened.good = opened.good[:fitting] + [False] * (opened.count - fitting)

    def _accept(self, opened: Opened, session: Session) -> int:
        """Exclude rows with a bad tag or a counter seen before; returns the number that remain."""
        good, count = opened.good, opened.count
        bad = good.count(False)
        if not bad:
            if count == 1:
                fresh = None if session.replay.accept(opened.counters[0]) else [False]
            else:
                fresh = session.replay.accept_run(opened.counters)
            if fresh is None:
                return count
            opened.good = fresh
        else:
            self._output.drop(Drop.BAD_TAG, bad)
            accept = session.replay.accept
            opened.good = [ok and accept(counter) for ok, counter in zip(good, opened.counters, strict=True)]
        accepted = opened.good.count(True)
        self._output.drop(Drop.REPLAYED, count - bad - accepted)
        return accepted

    def _accepted(self, session: Session, path: Path, size: int, now: float, *, has_data: bool) -> None:
        """Note that data messages of `size` bytes in total were authenticated and are no replays."""
        peer = session.peer
        if session is peer.next:
            self._indices.drop(peer.confirm(now))
            self._on_confirmed(peer, now)
        timers = peer.timers
        if not has_data:
            session.release_ciphers()
            timers.authenticated_received(now)
        elif timers.data_received(now) and timers.keepalive_at < peer.scheduled_at:
            self._deadlines.update(peer)
        peer.received_bytes += size
        peer.last_received_at = now
        if path is not peer.path or peer.is_passive:
            # Late packets of the previous session do not move the path back.
            self._heard_by(peer, path, may_roam=session not in peer.previous or peer.reachable_path is None)
        if now >= session.rekey_on_receive_at and session is peer.current and not timers.rekeyed_on_receive:
            timers.rekeyed_on_receive = True
            self._initiate(peer, now)

    def heard(self, peer: Peer, path: Path, size: int, now: float) -> None:
        """Note an authenticated handshake message: replies are sent to its source."""
        peer.received_bytes += size
        peer.last_received_at = now
        self._heard_by(peer, path, may_roam=True)

    def _heard_by(self, peer: Peer, path: Path, *, may_roam: bool) -> None:
        if peer.is_passive:
            self._output.announce(PeerRoamed(peer=peer, old=None, new=path))
        elif path is not peer.path and may_roam:
            old, peer.path = peer.path, path
            if old != path:
                self._output.announce(PeerRoamed(peer=peer, old=old, new=path))

    def announce(self, peer: Peer) -> None:
        """Report that the peer has a session to send with, and release its staged packets."""
        self._output.announce(SessionEstablished(peer=peer))
        if peer.staged:
            self._output.release(peer)


def _session_refusal(session: Session | None, path: Path, now: float) -> Drop | None:
    """The reason to drop data messages of this session on this path unopened, or None."""
    if session is None:
        return Drop.UNKNOWN_RECEIVER
    if path.peer is not None and path.peer != session.peer.public_key:
        return Drop.WRONG_PATH
    return Drop.EXPIRED_SESSION if session.is_expired(now) else None
