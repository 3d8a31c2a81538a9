"""The kernel's peers: changed one by one, looked at together.

The kernel has no request for a single peer, so whoever asks about one causes a look at all; those who ask at the same time
share it, and where a look is costly it also answers for a while after. Between looks this holds what the last one saw.
"""

import time
from dataclasses import replace

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import ConfigurationError, DeviceError, SideroLinkError
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import (
    HandshakeCompleted,
    HandshakeGaveUp,
    OnDeviceEvent,
    PathChanged,
    PeerConfig,
    PeerStatus,
)
from siderolink.common.wireguard.kernel import messages
from siderolink.common.wireguard.kernel.messages import PeerFacts
from siderolink.common.wireguard.kernel.relay import Relay, Slot
from siderolink.common.wireguard.kernel.snapshot import GaveUp, HandshakeSeen, PeerView, Roamed, Schedule, compare
from siderolink.common.wireguard.kernel.udp_path import KernelUdpPath
from siderolink.common.wireguard.kernel.wireguard import WireGuard
from siderolink.common.wireguard.path import Datagrams, Path

__all__ = ["Peers"]

_AT_ONCE = 100
_RETRY = 1.0
_LOOPBACK = 127
"""The first byte of a loopback address, in a sockaddr_in; in a sockaddr_in6, its place belongs to the flow information: 0."""
_SESSION_SECONDS = 180.0


class _Entry:
    """One peer."""

    __slots__ = ("changed_at", "is_adopted", "is_claimed", "keepalive", "networks", "view")

    def __init__(self, facts: PeerFacts, now: float) -> None:
        self.view = PeerView(facts, heard_at=now, sent_when_heard=facts.sent)
        self.networks: frozenset[object] = frozenset()
        """The allowed IPs it was last given."""
        self.keepalive = 0
        """Seconds; the kernel hears of it with the first endpoint: before, it would shake hands with nobody every 5 s."""
        self.changed_at = now
        """When we last changed it: what was read before then is out of date."""
        self.is_claimed = False
        """True once `set_peer` was called for it."""
        self.is_adopted = False
        """True until `settle`, for one that was there before."""


class Peers:
    """All peers of one interface, and the relay for those that come by streams."""

    def __init__(self, wireguard: WireGuard, mtu: int, on_event: OnDeviceEvent) -> None:
        self._wireguard = wireguard
        self._mtu = mtu
        self._on_event = on_event
        self._entries: dict[bytes, _Entry] = {}
        self._removed: dict[bytes, float] = {}
        self._relay: Relay | None = None
        self._schedule = Schedule(time.monotonic())
        self._began_at = float("-inf")
        self._lock = anyio.Lock()
        self._wake = anyio.Event()
        self._is_stopped = False

    def close(self) -> None:
        if self._relay is not None:
            self._relay.close()

    def stop(self) -> None:
        """The interface is gone: look no more."""
        self._is_stopped = True

    def drops(self) -> dict[str, int]:
        return dict(self._relay.drops) if self._relay is not None else {}

    def set_mtu(self, mtu: int) -> None:
        self._mtu = mtu
        if self._relay is not None:
            self._relay.set_mtu(mtu)

    def set_device_port(self, port: int) -> None:
        if self._relay is not None:
            self._relay.set_device_port(port)

    # Changing

    def set_peer(self, peer: PeerConfig) -> None:
        key, now = bytes(peer.public_key), time.monotonic()
        entry = self._entries.get(key)
        if peer.public_key.is_low_order:
            raise ConfigurationError(f"{peer.public_key} cannot be a peer's key: it is a point of low order")
        networks = frozenset(peer.allowed_ips)
        try:
            # Prefixes that stay are never taken away for a moment: packets may be on their way.
            replaces = entry is None or not entry.networks <= networks
            endpoint = messages.encode_endpoint(peer.endpoint) if peer.endpoint is not None else b""
            has_endpoint = bool(endpoint or (entry is not None and entry.view.facts.endpoint))
            told = peer if has_endpoint else replace(peer, persistent_keepalive=0)
            payload = messages.set_peer(self._wireguard.index, told, replace_allowed_ips=replaces)
        except OSError as error:
            raise ConfigurationError(f"{peer.endpoint} cannot be dialled: {error.strerror}") from error
        self._wireguard.set(payload, f"set the peer {peer.public_key}")
        if entry is None:
            entry = self._entries[key] = _Entry(PeerFacts(key), now)
        entry.networks, entry.is_claimed, entry.changed_at = networks, True, time.monotonic()
        entry.keepalive, entry.view.facts.keepalive = peer.persistent_keepalive, told.persistent_keepalive
        if endpoint:
            self._move(entry, endpoint)
        self._removed.pop(key, None)
        self._expect(key)

    def remove_peer(self, key: bytes) -> None:
        self._wireguard.set(messages.remove_peer(self._wireguard.index, key), "remove a peer")
        self._removed[key] = time.monotonic()
        self._forget(key)

    def _forget(self, key: bytes) -> None:
        entry = self._entries.pop(key, None)
        self._schedule.settled(key)
        if entry is not None and self._relay is not None:
            self._relay.hold(None, key, self._slot(entry))

    def settle(self) -> None:
        for key, entry in list(self._entries.items()):
            if not entry.is_claimed:
                self.remove_peer(key)
            elif entry.is_adopted:
                entry.is_adopted = False
                self._tell_session(entry.view.facts)

    def _tell_session(self, facts: PeerFacts) -> None:
        """The peer has a session that was made before us; a tunnel's ended with the process that held its stream."""
        is_by_udp = bool(facts.endpoint) and facts.endpoint[4] != _LOOPBACK
        if not is_by_udp or time.time() - facts.handshake_ns / 1e9 > _SESSION_SECONDS:
            return
        public_key = PublicKey(facts.key)
        self._on_event(PathChanged(public_key=public_key, old=None, new=KernelUdpPath(facts.endpoint)))
        self._on_event(HandshakeCompleted(public_key=public_key))

    def _move(self, entry: _Entry, endpoint: bytes) -> None:
        """The peer is reached at another endpoint now."""
        before = self._slot(entry)
        entry.view.facts.endpoint = endpoint
        if self._relay is not None:
            self._relay.hold(self._relay.at(endpoint), entry.view.facts.key, before)

    # Streams

    def offer(self, key: bytes, path: Path) -> None:
        """Use the path for the peer if it has none that is open; see Device.offer_path."""
        entry = self._entries.get(key)
        if entry is None or self._is_stopped:
            return
        relay = self._open_relay()
        facts, current = entry.view.facts, self._slot(entry)
        if current is None and facts.endpoint and facts.endpoint[4] != _LOOPBACK:
            return  # by UDP, which is always open
        if current is not None and current.path is not path and current.path.is_open and not current.is_barred:
            relay.slot(path)  # it has to prove itself, from an address of its own
            return
        try:
            if current is not None:
                relay.take_over(current, path)
            else:
                slot = relay.slot(path)
                doing = "give a peer its tunnel"
                self._wireguard.set(messages.peer_endpoint(self._wireguard.index, key, slot.endpoint), doing)
                self._move(entry, slot.endpoint)
                entry.changed_at = time.monotonic()
            self._keep_alive(entry)
        except SideroLinkError:
            return  # the interface is gone, and its end is told
        self._expect(key)

    def _keep_alive(self, entry: _Entry) -> None:
        """Have the kernel send a keepalive now, and from now on."""
        facts = entry.view.facts
        seconds = facts.keepalive = entry.keepalive or facts.keepalive
        if seconds:
            self._wireguard.set(messages.peer_keepalive(self._wireguard.index, facts.key, seconds), "keep a peer alive")

    def deliver(self, datagrams: Datagrams, path: Path) -> None:
        if not self._is_stopped:
            self._open_relay().deliver(datagrams, path)

    def _open_relay(self) -> Relay:
        if self._relay is None:
            self._relay = Relay(self._wireguard.port, self._mtu, self._expect)
        return self._relay

    def _slot(self, entry: _Entry) -> Slot | None:
        return self._relay.at(entry.view.facts.endpoint) if self._relay is not None else None

    def _path(self, endpoint: bytes) -> Path | None:
        if not endpoint:
            return None
        slot = self._relay.at(endpoint) if self._relay is not None else None
        return slot.path if slot is not None else KernelUdpPath(endpoint)

    # Looking

    def _expect(self, key: bytes) -> None:
        """Look soon: the peer may shake hands."""
        if key not in self._entries:
            return
        before = self._schedule.next_at()
        self._schedule.expect(key, time.monotonic())
        if self._schedule.next_at() < before:
            self._wake.set()

    async def watch(self) -> None:
        """Look when it is due, for ever."""
        while not self._is_stopped:
            now = time.monotonic()
            wait = self._schedule.next_at() - now if self._entries else None
            if wait is None or wait > 0:
                with anyio.move_on_after(wait):
                    await self._wake.wait()
                self._wake = anyio.Event()
                continue
            try:
                await self._look_once()
            except DeviceError:
                await anyio.sleep(_RETRY)

    async def refresh(self) -> None:
        """Look, unless the last look still answers. Raises DeviceError."""
        asked_at = time.monotonic()
        async with self._lock:
            if not self._is_stopped and not self._schedule.is_fresh(self._began_at, asked_at):
                await self._look()

    async def _look_once(self) -> None:
        async with self._lock:
            await self._look()

    async def adopt(self) -> None:
        """Take up the peers that were there before; nothing of theirs is told as an event."""
        await self._look_once()
        for entry in self._entries.values():
            entry.networks = frozenset(messages.read_allowed_ips(entry.view.facts.allowed))
            entry.is_adopted = True

    async def _look(self) -> None:
        """Read all peers in parts, letting others have their turn between them."""
        began_at = read_at = time.monotonic()
        seen: set[bytes] = set()
        is_whole, is_done, cost = True, False, 0.0
        self._wireguard.begin_dump()
        try:
            while not is_done:
                turn_at = time.thread_time()
                part = self._wireguard.next_part()
                is_whole &= not part.is_interrupted
                is_done = part.is_last
                self._take(part.peers, seen, read_at)
                # The kernel has filled the next part while this one was read.
                read_at = time.monotonic()
                cost += time.thread_time() - turn_at
                await checkpoint()
        finally:
            if not is_done:
                self._wireguard.give_up_dump()
        if is_whole:
            for key in [key for key, entry in self._entries.items() if key not in seen and entry.changed_at < began_at]:
                self._forget(key)
        self._removed = {key: at for key, at in self._removed.items() if at >= began_at}
        self._began_at = began_at
        self._schedule.looked(cost, time.monotonic())

    def _take(self, peers: list[PeerFacts], seen: set[bytes], read_at: float) -> None:
        now, unix_now = time.monotonic(), time.time()
        for facts in peers:
            if facts.key in seen:  # the rest of a peer whose allowed IPs did not fit
                entry = self._entries.get(facts.key)
                if entry is not None:
                    entry.view.facts.allowed += facts.allowed
                continue
            seen.add(facts.key)
            entry = self._entries.get(facts.key)
            if entry is None:
                if facts.key not in self._removed:
                    self._entries[facts.key] = entry = _Entry(facts, now)
                    self._move(entry, facts.endpoint)
            elif entry.changed_at < read_at:
                self._compare(entry, facts, now, unix_now)

    def _compare(self, entry: _Entry, facts: PeerFacts, now: float, unix_now: float) -> None:
        view = entry.view
        old = view.facts
        if facts == old:
            return
        if facts.endpoint != old.endpoint:
            self._judge_place(entry, facts)
        before = self._slot(entry)
        for change in compare(view, facts, now, unix_now):
            public_key = PublicKey(facts.key)
            match change:
                case Roamed(old=old_endpoint):
                    old_path, new_path = self._path(old_endpoint), self._path(facts.endpoint)
                    if self._relay is not None:
                        self._relay.hold(self._relay.at(facts.endpoint), facts.key, before)
                    if not facts.keepalive:
                        self._keep_alive(entry)
                    if new_path is not None:
                        self._on_event(PathChanged(public_key=public_key, old=old_path, new=new_path))
                case HandshakeSeen():
                    self._schedule.settled(facts.key)
                    self._on_event(HandshakeCompleted(public_key=public_key))
                case GaveUp():
                    self._on_event(HandshakeGaveUp(public_key=public_key))

    def _judge_place(self, entry: _Entry, facts: PeerFacts) -> None:
        """A peer that was heard by another one's stream is sent back to where it was, and that stream carries nothing more."""
        slot = self._relay.at(facts.endpoint) if self._relay is not None else None
        if slot is None or slot.path.peer in (None, facts.key):
            return
        slot.is_barred = True
        facts.endpoint = entry.view.facts.endpoint
        if facts.endpoint:
            payload = messages.peer_endpoint(self._wireguard.index, facts.key, facts.endpoint)
            self._wireguard.set(payload, "send a peer back to its own path")

    # Telling

    def status(self, key: bytes) -> PeerStatus | None:
        entry = self._entries.get(key)
        return self._status(entry) if entry is not None else None

    async def statuses(self) -> list[PeerStatus]:
        """All of them, made in slices."""
        found = []
        for number, entry in enumerate(list(self._entries.values()), start=1):
            found.append(self._status(entry))
            if number % _AT_ONCE == 0:
                await checkpoint()
        return found

    def _status(self, entry: _Entry) -> PeerStatus:
        facts = entry.view.facts
        path = self._path(facts.endpoint)
        return PeerStatus(
            public_key=PublicKey(facts.key),
            allowed_ips=messages.read_allowed_ips(facts.allowed),
            path=str(path) if path is not None else None,
            last_handshake=facts.handshake_ns / 1e9 if facts.handshake_ns else None,
            last_received=entry.view.last_received,
            received_bytes=facts.received,
            sent_bytes=facts.sent,
            persistent_keepalive=facts.keepalive or entry.keepalive,
            silent_for=time.monotonic() - entry.view.heard_at if entry.view.heard_at else None,
        )
