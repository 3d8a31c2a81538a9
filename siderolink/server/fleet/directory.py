"""The directory: the machines and claims that this server knows of, each found by a key in a dictionary.

What is not here is read through from the store. No method looks at all machines but those that list or load them.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from ipaddress import IPv6Address

from siderolink.common.keys import PublicKey
from siderolink.common.token_bucket import TokenBucket
from siderolink.common.wireguard.path import Path
from siderolink.server.admission.tokens import unique_token_digest
from siderolink.server.clock import Clock
from siderolink.server.refusals import StreamRefusal
from siderolink.server.store import Claim, Machine, Store

EndStream = Callable[[StreamRefusal], None]

_READS_PER_SECOND = 50.0
"""Virtual addresses that are looked up in the store because this server does not know them."""
_READS_AT_ONCE = 200.0


class LinkState(StrEnum):
    """What is known of a machine's link."""

    PENDING = "pending"
    """Joined with this key, no handshake yet."""
    UP = "up"
    DOWN = "down"
    """Nothing authenticated for too long, a goodbye, or not heard yet since the server started."""


@dataclass(slots=True, eq=False)
class Stream:
    """An open tunnel stream that names a machine's virtual address."""

    link: "Link"
    path: Path
    end: EndStream
    source: str
    """The address that the stream came from."""
    opened_at: float
    """By the monotonic clock."""
    is_proven: bool = False
    """True once something authenticated came by it."""


@dataclass(slots=True, eq=False)
class Link:
    """One machine's row, or one claim to it, and the session that this server holds for it."""

    machine: Machine
    """Of a claim: the row as it would be."""
    state: LinkState
    claim: Claim | None = None
    streams: tuple[Stream, ...] = ()
    path: Path | None = None
    """Where the device sends, as far as streams matter: the last path it took or was offered while it had none open."""
    endpoint: str | None = None
    """Where it was last heard by UDP, as host:port; None where that was the tunnel, or nowhere."""
    source: str | None = None
    """The address that its last authenticated packet came from."""
    goodbye_at: float | None = None
    """When it said goodbye, by the monotonic clock."""
    is_quiet: bool = False
    """True while no keepalives are sent, because nobody has answered them for long."""
    is_applied: bool = False
    """False while the device does not have the peer yet."""
    abandoned: set[PublicKey] = field(default_factory=set)
    """Keys that the machine had, and whose peers the device may still have."""


class Directory:
    """Who is known here, by id, key and address."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._by_id: dict[str, Link] = {}
        self._by_key: dict[PublicKey, Link] = {}
        self._by_virtual: dict[IPv6Address, Link] = {}
        self._by_overlay: dict[IPv6Address, Link] = {}
        self._claims: dict[str, Link] = {}
        self._claims_of: dict[str, list[Link]] = {}
        self._sources: Counter[str] = Counter()
        self._tokens: Counter[bytes] = Counter()
        self._token_key = os.urandom(16)
        self._reads = TokenBucket(_READS_PER_SECOND, _READS_AT_ONCE, clock.monotonic)
        self.pending = 0
        """How many machines and claims are PENDING."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Link]:
        return iter(list(self._by_id.values()))

    def get(self, machine_id: str) -> Link | None:
        return self._by_id.get(machine_id)

    def by_key(self, public_key: PublicKey) -> Link | None:
        """The machine, or the claim, that has this key."""
        return self._by_key.get(public_key)

    def by_virtual_address(self, address: IPv6Address) -> Link | None:
        return self._by_virtual.get(address)

    def machine_at(self, address: IPv6Address) -> Machine | None:
        """The accepted machine that has this overlay address."""
        link = self._by_overlay.get(address)
        return link.machine if link is not None and link.machine.is_accepted else None

    def link_at(self, address: IPv6Address) -> Link | None:
        """The machine that has this overlay address, accepted or pending."""
        return self._by_overlay.get(address)

    def claim(self, claim_id: str) -> Link | None:
        return self._claims.get(claim_id)

    @property
    def claim_count(self) -> int:
        return len(self._claims)

    def claims_of(self, machine_id: str) -> list[Link]:
        return list(self._claims_of.get(machine_id, ()))

    def knows_token(self, digest: bytes) -> bool:
        """Whether a unique token may be bound to a machine, or was given to one: asked before anything that costs."""
        return self._tokens[self._hash(digest)] > 0

    def _hash(self, digest: bytes) -> bytes:
        """Eight bytes that nobody outside can aim at."""
        return blake2b(digest, digest_size=8, key=self._token_key).digest()

    async def row(self, machine_id: str) -> Machine | None:
        """The row as it is stored."""
        return await self._store.transact(lambda transaction: transaction.machine(machine_id))

    async def row_at_virtual_address(self, address: IPv6Address) -> Machine | None:
        """The stored row of an address that this server does not know: another server may just have given it out.

        None also where too many were looked up lately.
        """
        if not self._reads.take(1):
            return None
        return await self._store.transact(lambda transaction: transaction.machine_by_virtual_address(address))

    # --- for the reconciler

    def add(self, link: Link) -> None:
        """Add a machine or a claim; the reconciler gives it its keys and addresses afterwards."""
        if link.claim is None:
            self._by_id[link.machine.id] = link
            self._count_tokens(link.machine, 1)
            source, link.source = link.source, None
            self.set_source(link, source)
        else:
            self._claims[link.claim.id] = link
            self._claims_of.setdefault(link.machine.id, []).append(link)
        self.pending += link.state is LinkState.PENDING

    def remove(self, link: Link) -> None:
        """Remove a machine or a claim with its key and addresses."""
        machine = link.machine
        if link.claim is None:
            self._by_id.pop(machine.id, None)
            self._count_tokens(machine, -1)
            self.set_source(link, None)
            self.release_overlay_address(link, machine.overlay_address)
        elif self._claims.pop(link.claim.id, None) is not None:
            others = self._claims_of[machine.id]
            others.remove(link)
            if not others:
                del self._claims_of[machine.id]
        if machine.virtual_address is not None:
            self.release_virtual_address(link, machine.virtual_address)
        if machine.public_key is not None:
            self.release_key(link, machine.public_key)
        self.set_state(link, LinkState.DOWN)

    def set_row(self, link: Link, machine: Machine) -> None:
        """Replace the row of a machine's link."""
        self._count_tokens(link.machine, -1)
        link.machine = machine
        self._count_tokens(machine, 1)

    def _count_tokens(self, machine: Machine, change: int) -> None:
        assigned = None if machine.assigned_token is None else unique_token_digest(machine.assigned_token)
        for digest in (machine.bound_digest, assigned):
            if digest is not None:
                hashed = self._hash(digest)
                self._tokens[hashed] += change
                if not self._tokens[hashed]:
                    del self._tokens[hashed]

    def set_state(self, link: Link, state: LinkState) -> None:
        self.pending += (state is LinkState.PENDING) - (link.state is LinkState.PENDING)
        link.state = state

    def set_source(self, link: Link, source: str | None) -> None:
        """Note where the link's last authenticated packet came from."""
        if link.claim is None and source != link.source:
            if source is not None:
                self._sources[source] += 1
            if link.source is not None:
                self._sources[link.source] -= 1
                if not self._sources[link.source]:
                    del self._sources[link.source]
        link.source = source

    def is_source(self, address: str) -> bool:
        """Whether some machine was last heard from this address."""
        return address in self._sources or f"::ffff:{address}" in self._sources

    def is_shared(self, source: str) -> bool:
        """Whether several machines were last heard from this address: it is a proxy's or a router's, and names none of them."""
        return self._sources[source] > 1

    def own_key(self, link: Link, key: PublicKey) -> None:
        self._by_key[key] = link

    def release_key(self, link: Link, key: PublicKey) -> bool:
        """Whether the link had the key."""
        if self._by_key.get(key) is not link:
            return False
        del self._by_key[key]
        return True

    def own_virtual_address(self, link: Link, address: IPv6Address) -> None:
        self._by_virtual[address] = link

    def release_virtual_address(self, link: Link, address: IPv6Address) -> None:
        if self._by_virtual.get(address) is link:
            del self._by_virtual[address]

    def own_overlay_address(self, link: Link, address: IPv6Address) -> None:
        self._by_overlay[address] = link

    def release_overlay_address(self, link: Link, address: IPv6Address) -> None:
        if self._by_overlay.get(address) is link:
            del self._by_overlay[address]
