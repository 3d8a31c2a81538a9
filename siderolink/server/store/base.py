"""The contract of a store: a row per machine, changed only in transactions, with a feed of the changes.

A store is asked per machine, when that machine is spoken of; nothing assumes that all rows are in memory. Races between joins
(and between servers that share a store) are decided by its unique constraints and by nothing else.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from ipaddress import IPv6Address
from typing import Protocol, TypeVar

from siderolink.common.keys import PublicKey
from siderolink.server.store.audit import AuditEntry, AuditQuery, Principal
from siderolink.server.store.feed import Change
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryQuery
from siderolink.server.store.ownership import Ownership, OwnershipRepository
from siderolink.server.store.rows import Ban, BanGrounds, Claim, LastSeen, Machine, ServerRecord
from siderolink.server.store.sealing import Sealer
from siderolink.server.store.tokens import JoinToken, TokenKey, TokenRepository

T = TypeVar("T")


class Transaction(Protocol):
    """One atomic transaction with a consistent view."""

    @property
    def tokens(self) -> TokenRepository: ...

    @property
    def ownership(self) -> OwnershipRepository: ...

    def expect(self, node_uuid: str, public_key: PublicKey, bans: Iterable[Ban] = (), tokens: Iterable[TokenKey] = ()) -> None:
        """Prefetch: the bans, the tokens, the machine with the UUID, and the machine or claim with the key."""

    async def machine(self, machine_id: str) -> Machine | None: ...

    async def machine_by_uuid(self, node_uuid: str) -> Machine | None:
        """The accepted machine of the UUID."""

    async def machine_by_key(self, public_key: PublicKey) -> Machine | None: ...

    async def machine_by_virtual_address(self, address: IPv6Address) -> Machine | None: ...

    async def machine_by_name(self, name: str) -> Machine | None:
        """The machine that was given this name."""

    async def insert(self, machine: Machine) -> Machine:
        """Add a row and return it as stored. Raises UniqueViolationError; the transaction can go on after that."""

    async def update(self, machine: Machine) -> Machine:
        """Replace the row of the same id, and end its use of the token that admitted it before; returns it as stored.

        Raises UniqueViolationError; StoreError without such a row.
        """

    async def delete(self, machine_id: str) -> Machine | None:
        """Remove a row, its claims, its link's owner and the use of a token that is reserved for it; None if there is none."""

    async def claims(self, machine_id: str) -> Sequence[Claim]:
        """All claims to a row, the oldest first."""

    async def claim_by_key(self, public_key: PublicKey) -> Claim | None: ...

    async def put_claim(self, claim: Claim) -> None:
        """Add a claim, or replace the one of the same id."""

    async def delete_claim(self, claim: Claim) -> None:
        """Remove a claim. Ignores a missing one."""

    async def is_banned(self, ban: Ban) -> bool: ...

    async def set_banned(self, ban: Ban, banned: bool, grounds: BanGrounds | None = None) -> None:
        """Make or lift a ban; of one that stands already, the grounds stay as they are."""

    async def audit(self, entry: AuditEntry) -> None:
        """Record a change with it; the store numbers the entries when it commits."""

    async def principals(self) -> Sequence[Principal]:
        """All principals; there are few."""

    async def put_principal(self, principal: Principal) -> None:
        """Add a principal, or replace the one of the same id. Raises UniqueViolationError for a name that another one has."""

    async def delete_principal(self, principal_id: str) -> None:
        """Remove a principal. Ignores a missing one."""

    async def note(self, seen: Mapping[str, LastSeen]) -> None:
        """Note when machines, by id, were last seen; passes over unknown ones. Changes no revision, tells the feed nothing."""

    async def add_history(self, entries: Sequence[HistoryEntry]) -> None:
        """Append to the history; the store numbers the entries. Tells the feed nothing."""

    async def server(self) -> ServerRecord | None:
        """The server's record; None before the first start."""

    async def set_server(self, record: ServerRecord, *, has_new_key: bool = False) -> None:
        """Replace the server's record. With `has_new_key` the feed tells ServerKeyChanged."""


Work = Callable[[Transaction], Awaitable[T]]


class Store(Protocol):
    """Where machines are remembered. Every method may raise StoreError."""

    @property
    def is_shared(self) -> bool:
        """Whether several servers may use it at the same time."""

    @property
    def sealer(self) -> Sealer:
        """Seals and opens the secrets that it holds."""

    def time(self) -> float:
        """Unix time, in seconds, by the clock that all stored times are of."""

    async def transact(self, work: Work[T]) -> T:
        """Run `work` in a transaction and return its result once that is durable; an exception from it undoes everything.

        A store may put several works into one commit, and may run a work again when it lost a race: apart from the
        transaction it must change nothing.
        """

    def machines(self) -> AsyncIterator[Machine]:
        """Every row, in no order. Rows that change meanwhile may be seen in either state."""

    async def bans(self) -> Mapping[Ban, BanGrounds]:
        """Every ban."""

    def owners(self, server_id: str | None = None) -> AsyncIterator[Ownership]:
        """The owners of all links, or the links of one server."""

    async def all_claims(self) -> Sequence[Claim]:
        """Every claim; there are few at a time."""

    async def history(self, query: HistoryQuery) -> Sequence[HistoryEntry]:
        """What happened, the newest first."""

    async def delete_history(self, query: HistoryQuery) -> int:
        """Delete all entries that match the query, ignoring its limit. Returns their number."""

    async def prune_history(self, bounds: HistoryBounds) -> int:
        """Delete what is too old or too much, piece by piece: others wait for a piece at most. Tells how many entries."""

    async def tokens(self, after: str = "", limit: int = 1000) -> Sequence[JoinToken]:
        """The first tokens by name whose names come after this one."""

    async def use_counts(self, token_ids: Collection[str], now: float) -> Mapping[str, int]:
        """The number of used slots by token id. Tokens without any may be missing."""

    async def audit_entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        """The entries that the query selects, in its order."""

    async def prune_audit(self, before: float, most: int) -> int:
        """Remove the oldest entries, `most` at most, that are older than this time; returns how many."""

    async def note_principals(self, used: Mapping[str, tuple[float, str]]) -> None:
        """Note when principals, by id, last called, and from where; passes over unknown ones. Tells the feed nothing."""

    def changes(self) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """All changes committed after entering, by whichever server, in order of commit."""
