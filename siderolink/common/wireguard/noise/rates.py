"""Bandwidth limits: token buckets in bytes, for all peers together and for each peer, checked once per batch.

Inner packets count with their padding. A peer without a limit has no buckets and costs nothing.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from .output import Drop

if TYPE_CHECKING:
    from .peer import Peer

BURST_SECONDS: Final = 0.1
LEAST_BURST: Final = 128 * 1024
"""Bytes; two super-packets pass at any configured rate."""


class Rate:
    """A token bucket, which starts full."""

    __slots__ = ("_burst", "_level", "_seen_at", "dropped", "per_second", "reason")

    def __init__(self, per_second: int, reason: Drop) -> None:
        self.per_second = per_second
        """Bytes."""
        self.reason = reason
        """The reason under which its drops are counted."""
        self.dropped = 0
        """Number of packets that did not fit."""
        self._burst = self._level = max(per_second * BURST_SECONDS, LEAST_BURST)
        self._seen_at: float | None = None

    def room(self, now: float) -> float:
        """Bytes that fit now."""
        if self._seen_at is not None:
            self._level = min(self._burst, self._level + (now - self._seen_at) * self.per_second)
        self._seen_at = now
        return self._level

    def take(self, size: int) -> None:
        self._level -= size

    def left(self) -> float:
        """Bytes that remained after the last batch."""
        return self._level


Buckets = tuple[Rate, ...]
"""A peer's own bucket and the common one, as far as they exist."""


def rows_within(buckets: Buckets, length: int, count: int, last: int, now: float) -> int:
    """The number of rows, from the first on, that fit into all buckets. Charges their bytes and counts the other rows."""
    room = min([rate.room(now) for rate in buckets])
    size, fitting = length * (count - 1) + last, count
    if size > room:
        fitting = min(int(room // length), count - 1) if length and room > 0 else 0
        size = length * fitting
    for rate in buckets:
        rate.take(size)
    if fitting < count:
        tightest(buckets).dropped += count - fitting
    return fitting


def tightest(buckets: Buckets) -> Rate:
    """The bucket that the last batch's drops are counted for."""
    return min(buckets, key=Rate.left)


class Rates:
    """The buckets of one device's peers, by direction."""

    def __init__(self, peers: Mapping[bytes, "Peer"]) -> None:
        self._peers = peers
        self.inbound: Rate | None = None
        self.outbound: Rate | None = None

    def set_all(self, inbound: int | None, outbound: int | None) -> None:
        """Bytes per second for all peers together; None for no limit."""
        self.inbound = _changed(self.inbound, inbound, Drop.BANDWIDTH_ALL_IN)
        self.outbound = _changed(self.outbound, outbound, Drop.BANDWIDTH_ALL_OUT)
        for peer in self._peers.values():
            self.adopt(peer)

    def set_peer(self, peer: "Peer", inbound: int | None, outbound: int | None) -> None:
        """Bytes per second for one peer; None removes its own limit."""
        own_in, own_out = peer.own_rates
        if own_in is None and own_out is None and inbound is None and outbound is None:
            return
        peer.own_rates = _changed(own_in, inbound, Drop.BANDWIDTH_IN), _changed(own_out, outbound, Drop.BANDWIDTH_OUT)
        self.adopt(peer)

    def adopt(self, peer: "Peer") -> None:
        """Assign the shared buckets to the peer."""
        own_in, own_out = peer.own_rates
        if own_in is None and own_out is None and self.inbound is None and self.outbound is None:
            peer.inbound_rates = peer.outbound_rates = None
            return
        peer.inbound_rates, peer.outbound_rates = _buckets((own_in, self.inbound)), _buckets((own_out, self.outbound))


def _changed(rate: Rate | None, per_second: int | None, reason: Drop) -> Rate | None:
    """Keep the bucket if its limit is unchanged."""
    if per_second is None:
        return None
    return rate if rate is not None and rate.per_second == per_second else Rate(per_second, reason)


def _buckets(rates: Iterable[Rate | None]) -> Buckets | None:
    return tuple(rate for rate in rates if rate is not None) or None
