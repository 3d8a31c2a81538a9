"""Limits on joins without a handshake, so that one source cannot keep the others out.

A join that is never followed by a handshake costs a row and a peer. While more than half of `max_pending` is used, one source
(an IPv4 address or an IPv6 /64) may have a quarter. When all is used, the oldest entry of the largest source is evicted, once
it has had time for its handshake.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from siderolink.common.newest_dict import NewestDict
from siderolink.server.admission.rules import source_key
from siderolink.server.clock import Clock
from siderolink.server.store import Claim

GRACE_SECONDS = 5.0
"""A joining machine completes its handshake within seconds; it is not evicted earlier than this."""
_LEAST_SHARE = 16
_COMPARED_SOURCES = 256
"""With more sources than this, the largest one is not searched for: the search would cost each join their number."""
_LOOKED_AT = 256
_NAMED_KEYS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """Resource limits and timeouts of machines. Times are in seconds."""

    max_machines: int = 65_536
    """Maximum known machines; further ones are refused with RESOURCE_EXHAUSTED."""
    rx_bits_per_second: int = 0
    """Bandwidth of inner packets from all machines to this server together; 0 disables the limit. Applies per server."""
    tx_bits_per_second: int = 0
    """The same, from this server to all machines."""
    machine_rx_bits_per_second: int = 0
    """Bandwidth from each machine without a limit of its own (`siderolink machine limit`); 0 disables the limit."""
    machine_tx_bits_per_second: int = 0
    """The same, to each machine."""
    max_pending: int = 65_536
    """Of these, machines without a completed handshake."""
    peer_without_handshake_timeout: float = 600.0
    """A machine that never completes a handshake is removed after this time. Existing machines try each endpoint for 30 s, so
    this allows for twenty."""
    down_after: float = 275.0
    """A link is down after this time without authenticated packets: 180 s of session, 5 s and 90 s of handshake attempts."""
    stream_without_packet_timeout: float = 90.0
    """A tunnel stream without authenticated packets is ended after this time, at which WireGuard itself gives up."""
    max_unproven_streams: int = 4
    """Maximum streams per virtual address without an authenticated packet so far; one more ends the oldest."""
    authorize_timeout: float = 10.0
    """Time limit of the authorize hook."""
    event_limit: int = 1024
    """Events that wait for one slow subscriber before the oldest are dropped."""

    @property
    def has_machine_rates(self) -> bool:
        """Whether each machine has a bandwidth limit."""
        return bool(self.machine_rx_bits_per_second or self.machine_tx_bits_per_second)

    max_offline: float | None = None
    """On Postgres: the server stops with a StoreError after this time without the database. None disables this."""


def bytes_per_second(bits: int | None, default: int = 0) -> int | None:
    """A device's limit: `bits`, or the default if that is None; None for no limit."""
    wanted = default if bits is None else bits
    return max(wanted // 8, 1) if wanted else None


@dataclass(slots=True, eq=False)
class Waiting:
    """A row or a claim without a handshake so far."""

    id: str
    source: str
    """What its source counts as."""
    since: float
    claim: Claim | None = None
    """None if the entry is a row."""


class PendingBudget:
    """Rows and claims without a handshake, by source and in the order of their arrival."""

    def __init__(self, limits: MachineLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._by_source: dict[str, OrderedDict[str, Waiting]] = {}
        self._in_order: OrderedDict[str, Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._in_order)

    def add(self, entry_id: str, source: str, claim: Claim | None = None) -> None:
        """Add an entry. A repeated one keeps its time."""
        if entry_id in self._in_order:
            return
        key = source_key(source) or source
        waiting = Waiting(entry_id, key, self._clock.monotonic(), claim)
        self._by_source.setdefault(key, OrderedDict())[entry_id] = self._in_order[entry_id] = waiting

    def discard(self, entry_id: str) -> None:
        """Remove an entry that completed a handshake or no longer exists."""
        waiting = self._in_order.pop(entry_id, None)
        if waiting is not None:
            entries = self._by_source[waiting.source]
            del entries[entry_id]
            if not entries:
                del self._by_source[waiting.source]

    def exceeds_share(self, source: str) -> bool:
        """Whether the source has its full share while more than half of the budget is used."""
        if 2 * len(self) <= self._limits.max_pending:
            return False
        share = max(_LEAST_SHARE, self._limits.max_pending // 4)
        return len(self._by_source.get(source_key(source) or source, ())) >= share

    def oldest(self, source: str | None = None, *, rows_only: bool = False) -> Waiting | None:
        """The entry to evict: the oldest of this source, or of the largest one; None if it still has time for its handshake."""
        if source is not None:
            entries = self._by_source.get(source_key(source) or source)
        elif len(self._by_source) <= _COMPARED_SOURCES:
            entries = max(self._by_source.values(), key=len, default=None)
        else:
            entries = self._in_order  # with so many sources, each has only a few
        for waiting in islice((entries or {}).values(), _LOOKED_AT):
            if waiting.claim is None or not rows_only:
                return waiting if self._clock.monotonic() - waiting.since >= GRACE_SECONDS else None
        return None


class NamedKeys:
    """Keys named by calls, with the first unique token of each. Prevents binding a token to another machine's key."""

    def __init__(self) -> None:
        self._digests: NewestDict[bytes, bytes | None] = NewestDict(_NAMED_KEYS)

    def first_digest(self, public_key: bytes, digest: bytes | None) -> bytes | None:
        """The digest that may be bound once the key is proved: this one, unless an earlier call named the key with another."""
        if public_key in self._digests:
            first = self._digests[public_key]
            return digest if first == digest else None
        self._digests.put(public_key, digest)
        return digest
