"""The directory: the machines and claims that this server knows, indexed by id, key and address.

Unknown rows are read through from the store. Only methods that list or load machines visit all of them; totals are kept.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address
from itertools import chain
from typing import NamedTuple, TypeVar

import anyio

from siderolink.common.keys import PublicKey
from siderolink.common.parted_dict import PartedDict
from siderolink.common.wireguard.path import Path
from siderolink.server.admission.tokens import assigned_digest
from siderolink.server.clock import Clock
from siderolink.server.fleet.known import Known
from siderolink.server.refusals import StreamRefusal
from siderolink.server.store import Claim, Machine, MachineAdmission, Store

T = TypeVar("T")
EndStream = Callable[[StreamRefusal], None]

_FEED_SECONDS = 2.0
"""Seconds a change by another server may take to arrive, because the feed polls every second."""
_MOST_AWAITED = 256


class LinkState(StrEnum):
    """The state of a machine's link."""

    PENDING = "pending"
    """Joined with this key, without a handshake so far."""
    UP = "up"
    DOWN = "down"
    """Silent for too long, said goodbye, or not heard since the server started."""


class Transport(StrEnum):
    """The transport assigned to a machine."""

    UDP = "udp"
    TUNNEL = "tunnel"


class MachineGroup(NamedTuple):
    """The dimensions by which machines are counted."""

    state: LinkState
    transport: Transport
    admission: MachineAdmission


@dataclass(slots=True, eq=False)
class Stream:
    """An open tunnel stream that names a machine's virtual address."""

    link: "MachineLink"
    path: Path
    end: EndStream
    source: str
    """The stream's source address."""
    opened_at: float
    """By the monotonic clock."""
    is_proven: bool = False
    """Whether an authenticated packet has arrived on it."""


@dataclass(slots=True, eq=False)
class MachineLink:
    """One machine's row, or one claim to it, and its session at this server."""

    machine: Machine
    """For a claim, the row as it would be."""
    state: LinkState
    claim: Claim | None = None
    streams: tuple[Stream, ...] = ()
    path: Path | None = None
    """The stream that the device sends on, if any."""
    endpoint: str | None = None
    """Last UDP endpoint, as host:port; None if it was last heard through the tunnel, or never."""
    source: str | None = None
    """The source address of its last authenticated packet."""
    cut_at: float | None = None
    """When the last stream with authenticated packets ended, on the monotonic clock."""
    goodbye_at: float | None = None
    """When it said goodbye, on the monotonic clock."""
    is_quiet: bool = False
    """Whether keepalives are disabled because they were unanswered for long."""
    is_applied: bool = False
    """Whether the device has the peer."""
    abandoned: frozenset[PublicKey] = frozenset()
    """Former keys whose peers the device may still have."""

    @property
    def is_tunnel(self) -> bool:
        """Whether it was last heard over a tunnel stream."""
        return self.endpoint is None and self.path is not None

    @property
    def group(self) -> MachineGroup:
        machine = self.machine
        return MachineGroup(self.state, Transport.TUNNEL if machine.tunnel else Transport.UDP, machine.admission)


def _change(counts: Counter[T], key: T, by: int) -> None:
    """Change a count; counts of zero are removed."""
    counts[key] += by
    if not counts[key]:
        del counts[key]


class DeniedMachines:
    """Denied machines by UUID and unique token, so that a denied machine stays denied with a new key."""

    def __init__(self) -> None:
        self._ids: dict[str | bytes, set[str]] = {}

    def find(self, node_uuid: str, digest: bytes | None) -> set[str]:
        """The ids of denied machines that have this UUID or this unique token."""
        return self._ids.get(node_uuid, set()) | self._ids.get(digest or b"", set())

    def add(self, machine: Machine) -> None:
        for name in self._names(machine):
            self._ids.setdefault(name, set()).add(machine.id)

    def remove(self, machine: Machine) -> None:
        for name in self._names(machine):
            ids = self._ids[name]
            ids.discard(machine.id)
            if not ids:
                del self._ids[name]

    def _names(self, machine: Machine) -> list[str | bytes]:
        if machine.admission is not MachineAdmission.DENIED:
            return []
        digests = {digest for digest in (machine.bound_digest, assigned_digest(machine)) if digest is not None}
        return [machine.node_uuid, *digests]


class HeardSources:
    """The source addresses where machines were last heard, and the open streams from there with authenticated packets."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._streams: dict[str, dict[Stream, None]] = {}

    def __contains__(self, address: str) -> bool:
        return address in self._counts

    def is_shared(self, source: str) -> bool:
        """Whether several machines were last heard from this address, as behind a proxy or a router."""
        return self._counts[source] > 1

    def add_stream(self, stream: Stream) -> None:
        self._streams.setdefault(stream.source, {})[stream] = None

    def remove_stream(self, stream: Stream) -> None:
        """Does nothing if it is not present."""
        streams = self._streams.get(stream.source)
        if streams is not None and stream in streams:
            del streams[stream]
            if not streams:
                del self._streams[stream.source]

    def has_stream_since_before(self, source: str, at: float) -> bool:
        """Whether a stream from this address has been open since before a time."""
        return any(stream.opened_at < at and stream.path.is_open for stream in self._streams.get(source, ()))

    def replace(self, old: str | None, new: str | None) -> None:
        """Count a machine under its new address."""
        if new is not None:
            _change(self._counts, new, 1)
        if old is not None:
            _change(self._counts, old, -1)


class Directory:
    """Known machines and claims by id, key and address."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._by_id: PartedDict[str, MachineLink] = PartedDict()
        self._by_key: dict[PublicKey, MachineLink] = {}
        self._by_virtual: dict[IPv6Address, MachineLink] = {}
        self._by_overlay: dict[IPv6Address, MachineLink] = {}
        self.claims: dict[str, MachineLink] = {}
        """By claim id."""
        self._claims_of: dict[str, list[MachineLink]] = {}
        self.sources = HeardSources()
        self.known = Known(clock)
        self.denied = DeniedMachines()
        self.token_users: Counter[str] = Counter()
        """Number of machines that each token (by id) last admitted."""
        self.groups: Counter[MachineGroup] = Counter()
        """Number of machines in each group that has any."""
        self._awaited: dict[IPv6Address, anyio.Event] = {}
        self.pending = 0
        """Number of machines and claims that are PENDING."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[MachineLink]:
        """All machines, unordered; they may change during the iteration."""
        return chain.from_iterable(self.parts())

    def parts(self) -> Iterator[list[MachineLink]]:
        """The same in parts, for work that yields to other tasks in between."""
        return self._by_id.parts()

    def get(self, machine_id: str) -> MachineLink | None:
        return self._by_id.get(machine_id)

    def by_key(self, public_key: PublicKey) -> MachineLink | None:
        """The machine or claim with this key."""
        return self._by_key.get(public_key)

    def by_virtual_address(self, address: IPv6Address) -> MachineLink | None:
        return self._by_virtual.get(address)

    def machine_at(self, address: IPv6Address) -> Machine | None:
        """The accepted machine with this overlay address."""
        link = self._by_overlay.get(address)
        return link.machine if link is not None and link.machine.is_accepted else None

    def link_at(self, address: IPv6Address) -> MachineLink | None:
        """The machine with this overlay address, accepted or pending."""
        return self._by_overlay.get(address)

    def claim(self, claim_id: str) -> MachineLink | None:
        return self.claims.get(claim_id)

    def claims_of(self, machine_id: str) -> list[MachineLink]:
        return list(self._claims_of.get(machine_id, ()))

    async def row(self, machine_id: str) -> Machine | None:
        """The stored row."""
        return await self._store.transact(lambda transaction: transaction.machine(machine_id))

    async def await_virtual_address(self, address: IPv6Address) -> MachineLink | None:
        """The link of an address that another server of the store may have just assigned.

        Waits for the store's feed, which costs no query. None if nothing arrives, or too many calls are waiting.
        """
        if address not in self._awaited and len(self._awaited) >= _MOST_AWAITED:
            return None
        event = self._awaited.setdefault(address, anyio.Event())
        try:
            with anyio.move_on_after(_FEED_SECONDS):
                await event.wait()
        finally:
            if self._awaited.get(address) is event and not event.statistics().tasks_waiting:
                del self._awaited[address]
        return self._by_virtual.get(address)

    # --- for the reconciler

    def add(self, link: MachineLink) -> None:
        """Add a machine or a claim; the reconciler then adds its keys and addresses."""
        if link.claim is None:
            self._by_id[link.machine.id] = link
            self._count(link, 1)
            self.sources.replace(None, link.source)
        else:
            self.claims[link.claim.id] = link
            self._claims_of.setdefault(link.machine.id, []).append(link)
        self.pending += link.state is LinkState.PENDING

    def remove(self, link: MachineLink) -> None:
        """Remove a machine or a claim with its key and addresses."""
        machine = link.machine
        if link.claim is None:
            self._by_id.pop(machine.id, None)
            self._count(link, -1)
            self.set_source(link, None)
            self.release_overlay_address(link, machine.overlay_address)
        elif self.claims.pop(link.claim.id, None) is not None:
            others = self._claims_of[machine.id]
            others.remove(link)
            if not others:
                del self._claims_of[machine.id]
        if machine.virtual_address is not None:
            self.release_virtual_address(link, machine.virtual_address)
        if machine.public_key is not None:
            self.release_key(link, machine.public_key)
        self.set_state(link, LinkState.DOWN)

    def set_row(self, link: MachineLink, machine: Machine) -> None:
        """Replace the row of a machine's link."""
        self._count(link, -1)
        link.machine = machine
        self._count(link, 1)

    def _count(self, link: MachineLink, by: int) -> None:
        """Count a machine's link and row in or out."""
        machine = link.machine
        _change(self.groups, link.group, by)
        (self.known.add_row if by > 0 else self.known.remove_row)(machine)
        (self.denied.add if by > 0 else self.denied.remove)(machine)
        if token_id := machine.join_token_id:
            _change(self.token_users, token_id, by)

    def set_state(self, link: MachineLink, state: LinkState) -> None:
        self.pending += (state is LinkState.PENDING) - (link.state is LinkState.PENDING)
        is_counted = self._by_id.get(link.machine.id) is link  # false for a claim, or if it was just removed
        if is_counted:
            _change(self.groups, link.group, -1)
        link.state = state
        if is_counted:
            _change(self.groups, link.group, 1)

    def set_source(self, link: MachineLink, source: str | None) -> None:
        """Set the source address of the link's last authenticated packet."""
        if link.claim is None and source != link.source:
            self.sources.replace(link.source, source)
        link.source = source

    def own_key(self, link: MachineLink, key: PublicKey) -> None:
        self._by_key[key] = link

    def release_key(self, link: MachineLink, key: PublicKey) -> bool:
        """Release a key; returns whether the link had it."""
        if self._by_key.get(key) is not link:
            return False
        del self._by_key[key]
        return True

    def own_virtual_address(self, link: MachineLink, address: IPv6Address) -> None:
        self._by_virtual[address] = link
        if address in self._awaited:
            self._awaited[address].set()

    def release_virtual_address(self, link: MachineLink, address: IPv6Address) -> None:
        if self._by_virtual.get(address) is link:
            del self._by_virtual[address]

    def own_overlay_address(self, link: MachineLink, address: IPv6Address) -> None:
        self._by_overlay[address] = link

    def release_overlay_address(self, link: MachineLink, address: IPv6Address) -> None:
        if self._by_overlay.get(address) is link:
            del self._by_overlay[address]


def log_fields(directory: Directory, machine_id: str | None) -> dict[str, str]:
    """The `extra` of a log record about a machine or a claim, if it is known."""
    link = None if machine_id is None else directory.get(machine_id) or directory.claim(machine_id)
    return link.machine.log_fields if link is not None else {"machine_id": machine_id} if machine_id else {}
