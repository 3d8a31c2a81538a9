"""What an engine has to say after a verb: datagrams, events, peers with packets to release, and counted drops."""

from collections import Counter
from typing import TYPE_CHECKING

from .drops import Drop

if TYPE_CHECKING:
    from .events import Event
    from .peer import Path, Peer


class Output:
    """Filled by the engine's rooms, emptied by its owner."""

    __slots__ = ("datagrams", "drops", "events", "ready")

    def __init__(self) -> None:
        self.datagrams: list[tuple[Path, bytes]] = []
        self.events: list[Event] = []
        self.ready: list[Peer] = []
        self.drops: Counter[Drop] = Counter()

    def drop(self, reason: Drop, count: int = 1) -> None:
        if count:
            self.drops[reason] += count

    def send(self, peer: "Peer", path: "Path", datagram: bytes) -> None:
        peer.sent_bytes += len(datagram)
        self.datagrams.append((path, datagram))
