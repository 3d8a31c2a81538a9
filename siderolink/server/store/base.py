"""The contract of a store: one row per machine, changed only in transactions, and a feed of the changes.

Rows are read one machine at a time, when a call concerns that machine; nothing assumes that all rows fit in memory. Races
between joins (and between servers that share a store) are decided by its unique constraints alone.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from siderolink.common.keys import PublicKey
from siderolink.server.store.audit import AuditEntry, AuditQuery, Principal
from siderolink.server.store.feed import Change, Wanted
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

    async def machine_by_name(self, name: str) -> Machine | None:
        """The machine with this name."""

    async def insert(self, machine: Machine) -> Machine:
        """Add a row and return it as stored. Raises UniqueViolationError, after which the transaction can continue."""

    async def update(self, machine: Machine) -> Machine:
        """Replace the row with the same id and return it as stored. Ends its use of the token that admitted it before.

        Raises UniqueViolationError; StoreError if there is no such row.
        """

    async def delete(self, machine_id: str) -> Machine | None:
        """Remove a row with its claims, its link's owner and its reserved token use, and return it; None if there is none."""

    async def claims(self, machine_id: str) -> Sequence[Claim]:
        """All claims to a row, oldest first."""

    async def claim_by_key(self, public_key: PublicKey) -> Claim | None: ...

    async def put_claim(self, claim: Claim) -> None:
        """Add a claim, or replace the one with the same id."""

    async def delete_claim(self, claim: Claim) -> None:
        """Remove a claim. Ignores a missing one."""

    async def is_banned(self, *bans: Ban) -> bool:
        """Whether any of these bans exists."""

    async def set_banned(self, ban: Ban, banned: bool, grounds: BanGrounds | None = None) -> None:
        """Make or lift a ban. A ban that already exists keeps its grounds."""

    async def audit(self, entry: AuditEntry) -> None:
        """Record a change in the audit; the store numbers the entries at the commit."""

    async def principals(self) -> Sequence[Principal]:
        """All principals; there are few."""

    async def put_principal(self, principal: Principal) -> None:
        """Add a principal, or replace the one with the same id. Raises UniqueViolationError for a name already in use."""

    async def delete_principal(self, principal_id: str) -> None:
        """Remove a principal. Ignores a missing one."""

    async def note(self, seen: Mapping[str, LastSeen], now: float) -> None:
        """Note when machines, by id, were last seen; ignores unknown ids. No new revision, nothing published to the feed.

        `now` is the store's Unix time: see `LastSeen.of`.
        """

    async def add_history(self, entries: Sequence[HistoryEntry]) -> None:
        """Append to the history; the store numbers the entries. Publishes nothing to the feed."""

    async def server(self) -> ServerRecord | None:
        """The server's record; None before the first start."""

    async def set_server(self, record: ServerRecord, *, has_new_key: bool = False) -> None:
        """Replace the server's record. With `has_new_key` the feed publishes ServerKeyChanged."""


Work = Callable[[Transaction], Awaitable[T]]


class Store(Protocol):
    """The persistent state of machines. Every method may raise StoreError."""

    @property
    def is_shared(self) -> bool:
        """Whether several servers may use it concurrently."""

    @property
    def sealer(self) -> Sealer:
        """Seals and opens the secrets stored in it."""

    def time(self) -> float:
        """Unix time in seconds, by the clock that all stored times refer to."""

    async def transact(self, work: Work[T]) -> T:
        """Run `work` in a transaction and return its result once that is durable; an exception from it undoes everything.

        A store may put several works into one commit, and may run a work again after it lost a race: a work must have no side
        effects outside the transaction.
        """

    async def transact_urgently(self, work: Work[T]) -> T:
        """Like `transact`, but without waiting behind others; for heartbeats, which must not be late."""

    def machines(self) -> AsyncIterator[Machine]:
        """Every row, unordered. A row that changes during the iteration appears in either state."""

    async def bans(self) -> Mapping[Ban, BanGrounds]:
        """Every ban."""

    def owners(self, server_id: str | None = None) -> AsyncIterator[Ownership]:
        """The owners of all links, or only those of one server."""

    async def all_claims(self) -> Sequence[Claim]:
        """Every claim; there are only a few at a time."""

    async def history(self, query: HistoryQuery) -> Sequence[HistoryEntry]:
        """The entries that the query selects, newest first (oldest first with `after_seq`)."""

    async def delete_history(self, query: HistoryQuery) -> int:
        """Delete all entries that match the query, ignoring its limit. Returns their number."""

    async def prune_history(self, bounds: HistoryBounds) -> int:
        """Delete entries that are too old or too many, in pieces: others wait for one piece at most. Returns their number."""

    async def tokens(self, after: str = "", limit: int = 1000) -> Sequence[JoinToken]:
        """One page of tokens ordered by name: the first `limit` after the name `after`."""

    async def use_counts(self, token_ids: Collection[str], now: float) -> Mapping[str, int]:
        """The number of used slots by token id. Tokens without uses may be missing."""

    async def audit_entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        """The entries that the query selects, in its order."""

    async def prune_audit(self, before: float, most: int) -> int:
        """Remove up to `most` of the oldest entries that are older than `before`; returns how many."""

    async def note_principals(self, used: Mapping[str, tuple[float, str]]) -> None:
        """Note when, and from where, principals last called; ignores unknown ids. Publishes nothing to the feed."""

    def changes(self, wanted: Wanted | None = None) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        """The changes that any server commits after entering, in commit order: all of them, or those that are `wanted`.

        ChangesLost comes in any case.
        """
