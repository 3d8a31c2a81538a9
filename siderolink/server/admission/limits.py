"""Limits on joins without a handshake, so that no source keeps the others out.

A join that is never followed by a handshake costs a row and a peer. While more than half of `max_pending` is used, one source
(an IPv4 address, or an IPv6 /64) may hold a quarter. When all is used, the oldest of the source that holds most gives way, once
it has had its time.
"""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from siderolink.server.admission.rules import source_key
from siderolink.server.clock import Clock
from siderolink.server.store import Claim

GRACE_SECONDS = 5.0
"""A machine that joined shakes hands within seconds; so long it does not give way."""
_LEAST_SHARE = 16
_COMPARED_SOURCES = 256
"""With more sources than this, nobody looks for the one that holds most: that would cost each join their number."""
_LOOKED_AT = 256
_NAMED_KEYS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """How much machines may cost, and how long they may take. Times are seconds."""

    max_machines: int = 65_536
    """Machines known at a time; more are refused with RESOURCE_EXHAUSTED."""
    rx_bits_per_second: int = 0
    """Bandwidth of inner packets from all machines to this server together; 0 for no limit. Each server has its own."""
    tx_bits_per_second: int = 0
    """The same from this server to all machines."""
    machine_rx_bits_per_second: int = 0
    """Bandwidth from each machine that has no limit of its own (`siderolink machine limit`); 0 for no limit."""
    machine_tx_bits_per_second: int = 0
    """The same to each machine."""
    max_pending: int = 65_536
    """Of these, machines that have not shaken hands yet."""
    peer_without_handshake_timeout: float = 600.0
    """A machine that never shakes hands is forgotten after so long. Existing machines try each endpoint for 30 s, so this is
    time for twenty."""
    down_after: float = 275.0
    """A link is down when nothing authenticated came for so long: 180 s of session, 5 s and 90 s of attempts at a new one."""
    stream_without_packet_timeout: float = 90.0
    """A tunnel stream by which nothing authenticated comes is ended after so long: WireGuard itself gives up then."""
    max_unproven_streams: int = 4
    """Streams per virtual address by which nothing authenticated has come yet; one more ends the oldest."""
    authorize_timeout: float = 10.0
    """How long the authorize hook may take."""
    event_limit: int = 1024
    """Events that wait for one slow reader before the oldest are dropped."""

    @property
    def has_machine_rates(self) -> bool:
        """Whether each machine has a limit of bandwidth."""
        return bool(self.machine_rx_bits_per_second or self.machine_tx_bits_per_second)

    max_offline: float | None = None
    """On Postgres: the server ends, with a StoreError, after so long without the database. None for never."""


def bytes_per_second(bits: int | None, default: int = 0) -> int | None:
    """A device's limit: this one, or the default where it is None; None for no limit."""
    wanted = default if bits is None else bits
    return max(wanted // 8, 1) if wanted else None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A row or a claim that waits for its handshake."""

    id: str
    since: float
    claim: Claim | None = None
    """None if the entry is a row."""


class PendingBudget:
    """Rows and claims, by id, that wait for their handshake, by source and in the order in which they came."""

    def __init__(self, limits: MachineLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._by_source: dict[str, OrderedDict[str, Waiting]] = {}
        self._in_order: OrderedDict[str, Waiting] = OrderedDict()
        self._sources: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def add(self, entry_id: str, source: str, claim: Claim | None = None) -> None:
        """An entry waits from now on; repeated, it keeps its time."""
        if entry_id in self._sources:
            return
        key = source_key(source) or source
        self._sources[entry_id] = key
        waiting = Waiting(entry_id, self._clock.monotonic(), claim)
        self._by_source.setdefault(key, OrderedDict())[entry_id] = self._in_order[entry_id] = waiting

    def discard(self, entry_id: str) -> None:
        """Remove an entry that completed a handshake or is gone."""
        key = self._sources.pop(entry_id, None)
        if key is not None:
            entries = self._by_source[key]
            del entries[entry_id]
            del self._in_order[entry_id]
            if not entries:
                del self._by_source[key]

    def takes_too_much(self, source: str) -> bool:
        """Whether the source holds all that it may, while more than half of the budget is used."""
        if 2 * len(self) <= self._limits.max_pending:
            return False
        share = max(_LEAST_SHARE, self._limits.max_pending // 4)
        return len(self._by_source.get(source_key(source) or source, ())) >= share

    def oldest(self, source: str | None = None, *, rows_only: bool = False) -> Waiting | None:
        """The entry to evict: the oldest of this source, or of the largest one; None while it still has time."""
        if source is not None:
            entries = self._by_source.get(source_key(source) or source)
        elif len(self._by_source) <= _COMPARED_SOURCES:
            entries = max(self._by_source.values(), key=len, default=None)
        else:
            entries = self._in_order  # so many sources hold little each
        for waiting in islice((entries or {}).values(), _LOOKED_AT):
            if waiting.claim is None or not rows_only:
                return waiting if self._clock.monotonic() - waiting.since >= GRACE_SECONDS else None
        return None


class NamedKeys:
    """Keys that calls have named, with each one's first unique token. Prevents binding a token to another machine's key."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, bytes | None] = OrderedDict()

    def first_digest(self, public_key: bytes, digest: bytes | None) -> bytes | None:
        """The digest that may be bound when the key is proved: this one, unless another call named the key before."""
        if public_key in self._digests:
            first = self._digests[public_key]
            return digest if first == digest else None
        self._digests[public_key] = digest
        if len(self._digests) > _NAMED_KEYS:
            self._digests.popitem(last=False)
        return digest
