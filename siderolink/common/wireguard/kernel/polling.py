"""Polls the kernel's peers: reads them all when that is due, and reports what changed since the last poll.

The kernel has no request for a single peer, so a query for one reads all. Concurrent queries share a poll, and if polls are
expensive, the last one also answers later queries for a while.
"""

import time

import anyio
from anyio.lowlevel import checkpoint

from siderolink.common.errors import DeviceError
from siderolink.common.keys import PublicKey
from siderolink.common.wireguard.device import HandshakeGaveUp, OnDeviceEvent, PathChanged, PeerHandshake
from siderolink.common.wireguard.kernel import messages
from siderolink.common.wireguard.kernel.messages import PeerFacts
from siderolink.common.wireguard.kernel.peer_table import PeerEntry, PeerTable, boot_time
from siderolink.common.wireguard.kernel.snapshot import GaveUp, HandshakeSeen, PollSchedule, Roamed, compare
from siderolink.common.wireguard.kernel.wireguard import WireGuard

__all__ = ["PeerPoller"]

_RETRY: float = 1.0


class PeerPoller:
    """Keeps a table up to date with the kernel."""

    def __init__(self, wireguard: WireGuard, table: PeerTable, on_event: OnDeviceEvent) -> None:
        self._wireguard = wireguard
        self._table = table
        self._on_event = on_event
        self._schedule = PollSchedule(time.monotonic())
        self._began_at = float("-inf")
        self._lock = anyio.Lock()
        self._wake = anyio.Event()
        self.is_stopped = False

    def stop(self) -> None:
        """Stop polling once the interface is gone."""
        self.is_stopped = True

    def expect(self, key: bytes) -> None:
        """Poll soon, because a handshake with the peer is expected."""
        if key not in self._table.entries:
            return
        before = self._schedule.next_at()
        self._schedule.expect(key, time.monotonic())
        if self._schedule.next_at() < before:
            self._wake.set()

    def await_arrival(self, key: bytes, is_awaited: bool) -> None:
        """Poll more often while the peer may start a session at any time."""
        before = self._schedule.next_at()
        self._schedule.await_arrival(key, is_awaited, time.monotonic())
        if self._schedule.next_at() < before:
            self._wake.set()

    def forget(self, key: bytes) -> None:
        """Forget a removed peer."""
        self._table.forget(key)
        self._schedule.settled(key)
        self._schedule.await_arrival(key, False, time.monotonic())

    async def watch(self) -> None:
        """Poll whenever it is due, until cancelled."""
        while not self.is_stopped:
            now = time.monotonic()
            wait = self._schedule.next_at() - now if self._table.entries else None
            if wait is None or wait > 0:
                with anyio.move_on_after(wait):
                    await self._wake.wait()
                self._wake = anyio.Event()
                continue
            try:
                async with self._lock:
                    await self._poll()
            except DeviceError:
                await anyio.sleep(_RETRY)

    async def refresh(self, *, is_part: bool = False) -> None:
        """Poll, unless the last poll is recent enough; the parts of one query share a poll. Raises DeviceError."""
        asked_at = time.monotonic()
        async with self._lock:
            if not self.is_stopped and not self._schedule.is_fresh(self._began_at, asked_at, is_part=is_part):
                await self._poll()

    async def adopt(self) -> None:
        """Register the peers of an adopted interface, without events."""
        async with self._lock:
            await self._poll()
        for entry in self._table.entries.values():
            entry.networks = frozenset(messages.read_allowed_ips(entry.view.facts.allowed))
            entry.is_adopted = True

    async def _poll(self) -> None:
        """Read all peers in parts. Yields to other tasks."""
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
                self._note(part.peers, seen, read_at)
                # The kernel has filled the next part while this one was read.
                read_at = time.monotonic()
                cost += time.thread_time() - turn_at
                await checkpoint()
        finally:
            if not is_done:
                self._wireguard.give_up_dump()
        if is_whole:
            await self._forget_missing(seen, began_at)
        self._table.forget_removals(before=began_at)
        self._began_at = began_at
        self._schedule.polled(cost, time.monotonic())

    async def _forget_missing(self, seen: set[bytes], began_at: float) -> None:
        """Forget the peers that a poll did not find. Yields to other tasks."""
        for part in self._table.entries.parts():
            for entry in part:
                key = entry.view.facts.key
                is_missing = key not in seen and entry.changed_at < began_at
                if is_missing and self._table.entries.get(key) is entry:
                    self.forget(key)
            await checkpoint()

    def _note(self, peers: list[PeerFacts], seen: set[bytes], read_at: float) -> None:
        now, unix_now = boot_time(), time.time()
        for facts in peers:
            entry = self._table.entries.get(facts.key)
            if facts.key in seen:  # the rest of a peer whose allowed IPs did not fit
                if entry is not None:
                    entry.view.facts.allowed += facts.allowed
                continue
            seen.add(facts.key)
            if entry is None:
                self._table.add_found(facts)
            elif entry.changed_at < read_at:
                self._compare(entry, facts, now, unix_now)

    def _compare(self, entry: PeerEntry, facts: PeerFacts, now: float, unix_now: float) -> None:
        view, streams = entry.view, self._table.streams
        old = view.facts
        if facts == old:
            return
        if facts.endpoint != old.endpoint:
            self._check_stream(entry, facts)
        before = streams.at(old.endpoint)
        for change in compare(view, facts, now, unix_now):
            public_key = PublicKey(facts.key)
            match change:
                case Roamed(old=old_endpoint):
                    old_path, new_path = streams.path(old_endpoint), streams.path(facts.endpoint)
                    streams.hold(facts.endpoint, facts.key, before)
                    if not facts.keepalive:
                        self._table.keep_alive(entry)
                    if new_path is not None:
                        self._on_event(PathChanged(public_key=public_key, old=old_path, new=new_path))
                case HandshakeSeen():
                    self._schedule.settled(facts.key)
                    self._on_event(PeerHandshake(public_key=public_key))
                case GaveUp():
                    self._on_event(HandshakeGaveUp(public_key=public_key))

    def _check_stream(self, entry: PeerEntry, facts: PeerFacts) -> None:
        """Restore the endpoint of a peer that was heard by another one's stream, and close that stream's path."""
        slot = self._table.streams.at(facts.endpoint)
        if slot is None or slot.path.peer in (None, facts.key):
            return
        slot.is_barred = True
        facts.endpoint = entry.view.facts.endpoint
        if facts.endpoint:
            payload = messages.peer_endpoint(self._wireguard.index, facts.key, facts.endpoint)
            self._wireguard.set(payload, "send a peer back to its own path")
