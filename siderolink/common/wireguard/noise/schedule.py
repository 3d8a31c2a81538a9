"""Which peer's timer is due next, among many peers.

Deadlines mostly move later, with every packet. So the heap is lazy: an entry may be early, never late, and is put right when it
comes to the top. Touching a peer is cheap and nothing here costs the number of peers.
"""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

from .timers import NEVER

if TYPE_CHECKING:
    from .peer import Peer


class Schedule:
    """The peers by their next deadline."""

    __slots__ = ("_heap", "_order")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Peer]] = []
        self._order = count()

    def update(self, peer: "Peer") -> None:
        """Note the peer's next deadline; to be called whenever one may have moved earlier."""
        at = peer.timers.next_at()
        if at < peer.scheduled_at:
            peer.scheduled_at = at
            heappush(self._heap, (at, next(self._order), peer))

    def earliest(self) -> float:
        """A time before which nothing is due; cheaper than the exact one, for use after every packet."""
        return self._heap[0][0] if self._heap else NEVER

    def next_at(self) -> float:
        """The exact next deadline of all peers, or NEVER."""
        heap = self._heap
        while heap:
            at, _, peer = heap[0]
            if at == peer.scheduled_at and at == peer.timers.next_at():
                return at
            self._put_right(at, peer)
        return NEVER

    def due(self, now: float) -> Iterator["Peer"]:
        """The peers whose deadline has come; the caller acts on each and calls `update` before taking the next."""
        while self.next_at() <= now:
            peer = heappop(self._heap)[2]
            peer.scheduled_at = NEVER
            yield peer

    def _put_right(self, at: float, peer: "Peer") -> None:
        heappop(self._heap)
        if at == peer.scheduled_at:
            peer.scheduled_at = NEVER
            self.update(peer)
