"""The kernel's peers as of the last poll, and by which stream each of them is reached."""

import time
from collections.abc import AsyncIterator, Iterable, Iterator

from anyio.lowlevel import checkpoint

from siderolink.common.keys import PublicKey
from siderolink.common.parted_dict import PartedDict
from siderolink.common.tasks import in_parts
from siderolink.common.wireguard.device import PeerStatus
from siderolink.common.wireguard.kernel import messages
from siderolink.common.wireguard.kernel.messages import PeerFacts
from siderolink.common.wireguard.kernel.relay import Slot
from siderolink.common.wireguard.kernel.snapshot import PeerView
from siderolink.common.wireguard.kernel.streams import Streams
from siderolink.common.wireguard.kernel.wireguard import WireGuard

__all__ = ["PeerEntry", "PeerTable", "boot_time"]

_AT_ONCE = 64


def boot_time() -> float:
    """Seconds on a monotonic clock that also runs while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class PeerEntry:
    """One peer."""

    __slots__ = ("changed_at", "is_adopted", "is_claimed", "keepalive", "networks", "view")

    def __init__(self, facts: PeerFacts) -> None:
        self.view = PeerView(facts, heard_at=boot_time(), sent_when_heard=facts.sent)
        self.networks: frozenset[object] = frozenset()
        """The allowed IPs it was last given."""
        self.keepalive = 0
        """Seconds. Set in the kernel together with the first endpoint; earlier, it would try a handshake every 5 s in vain."""
        self.changed_at = time.monotonic()
        """When this process last changed it: anything read before that is stale."""
        self.is_claimed = False
        """True once `set_peer` was called for it."""
        self.is_adopted = False
        """True until `settle`, for a peer of an adopted interface."""


class PeerTable:
    """The peers of one interface, by their public keys."""

    def __init__(self, wireguard: WireGuard, streams: Streams) -> None:
        self.entries: PartedDict[bytes, PeerEntry] = PartedDict()
        self.streams = streams
        self.removed_received_bytes = self.removed_sent_bytes = 0
        """Traffic of removed peers, as of the last poll."""
        self._wireguard = wireguard
        self._removed: dict[bytes, float] = {}
        """When each peer was removed: a poll that began before still finds it."""

    def add(self, key: bytes) -> PeerEntry:
        """A peer that is being set."""
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = PeerEntry(PeerFacts(key))
        self._removed.pop(key, None)
        return entry

    def add_found(self, facts: PeerFacts) -> None:
        """Register a peer that a poll found, unless it was just removed here."""
        if facts.key not in self._removed:
            entry = self.entries[facts.key] = PeerEntry(facts)
            self.streams.hold(facts.endpoint, facts.key, self.slot(entry))

    def forget(self, key: bytes) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.removed_received_bytes += entry.view.facts.received
            self.removed_sent_bytes += entry.view.facts.sent
            self.streams.hold(b"", key, self.slot(entry))

    def note_removal(self, key: bytes) -> None:
        self._removed[key] = time.monotonic()

    def forget_removals(self, *, before: float) -> None:
        self._removed = {key: at for key, at in self._removed.items() if at >= before}

    def slot(self, entry: PeerEntry) -> Slot | None:
        """The stream by which the kernel reaches the peer; None if it uses UDP."""
        return self.streams.at(entry.view.facts.endpoint)

    def move(self, entry: PeerEntry, endpoint: bytes) -> None:
        """Note the peer's new endpoint."""
        before = self.slot(entry)
        entry.view.facts.endpoint = endpoint
        self.streams.hold(endpoint, entry.view.facts.key, before)

    def keep_alive(self, entry: PeerEntry) -> None:
        """Make the kernel send a keepalive now and from now on. Raises SideroLinkError."""
        facts = entry.view.facts
        seconds = facts.keepalive = entry.keepalive or facts.keepalive
        if seconds:
            self._wireguard.set(messages.peer_keepalive(self._wireguard.index, facts.key, seconds), "keep a peer alive")

    def status(self, key: bytes) -> PeerStatus | None:
        entry = self.entries.get(key)
        return self._status(entry) if entry is not None else None

    async def statuses(self, keys: Iterable[PublicKey] | None = None) -> AsyncIterator[list[PeerStatus]]:
        """All peers, or the existing ones of `keys`, in parts. Yields to other tasks."""
        for part in self.entries.parts(_AT_ONCE) if keys is None else self._entries_of(keys):
            yield [self._status(entry) for entry in part]
            await checkpoint()

    def _entries_of(self, keys: Iterable[PublicKey]) -> Iterator[list[PeerEntry]]:
        for part in in_parts(keys, _AT_ONCE):
            yield [entry for key in part if (entry := self.entries.get(bytes(key))) is not None]

    def _status(self, entry: PeerEntry) -> PeerStatus:
        view, facts = entry.view, entry.view.facts
        path = self.streams.path(facts.endpoint)
        return PeerStatus(
            public_key=PublicKey(facts.key),
            allowed_ips=messages.read_allowed_ips(facts.allowed),
            path=str(path) if path is not None else None,
            last_handshake=facts.handshake_ns / 1e9 if facts.handshake_ns else None,
            last_received=view.last_received,
            received_bytes=facts.received,
            sent_bytes=facts.sent,
            persistent_keepalive=facts.keepalive or entry.keepalive,
            silent_for=max(0.0, boot_time() - view.received_at) if view.received_at is not None else None,
        )
