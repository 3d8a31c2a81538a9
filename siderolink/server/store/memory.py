"""An in-memory store that lives as long as its process: the default when embedded."""

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import TypeVar

from siderolink.common.errors import StoreError
from siderolink.common.keys import PublicKey
from siderolink.server.store.audit import AuditEntry, AuditQuery, Principal
from siderolink.server.store.base import Work
from siderolink.server.store.feed import (
    DEFAULT_FEED_LIMIT,
    AuditAdded,
    BanChanged,
    Change,
    ClaimChanged,
    Feeds,
    MachineChanged,
    MachineDeleted,
    PrincipalChanged,
    ServerKeyChanged,
    Wanted,
)
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryQuery, MemoryHistory
from siderolink.server.store.memory_ownership import MemoryOwnership, OwnershipTable
from siderolink.server.store.memory_tokens import MemoryTokens, TokenTable
from siderolink.server.store.ownership import Ownership
from siderolink.server.store.rows import (
    UNIQUE_COLUMNS,
    Ban,
    BanGrounds,
    Claim,
    LastSeen,
    Machine,
    ServerRecord,
    UniqueViolationError,
    unique_values,
)
from siderolink.server.store.sealing import KEY_BYTES, GivenKey, Sealer
from siderolink.server.store.tokens import JoinToken, TokenKey

T = TypeVar("T")

MAX_AUDIT_ENTRIES = 10_000
"""Limit of the in-memory store."""


class _Table:
    """The rows and one index per unique column. Every change is checked completely before anything is modified."""

    def __init__(self) -> None:
        self.rows: dict[str, Machine] = {}
        self.claims: dict[str, Claim] = {}
        self.claims_by_machine: dict[str, dict[str, Claim]] = {}
        self.claims_by_key: dict[PublicKey, Claim] = {}
        self.banned: dict[Ban, BanGrounds] = {}
        self.principals: dict[str, Principal] = {}
        self.audit: deque[AuditEntry] = deque(maxlen=MAX_AUDIT_ENTRIES)
        self.audit_seq = 0
        self.server: ServerRecord | None = None
        self.tokens = TokenTable()
        self.ownership = OwnershipTable()
        self._indexes: dict[str, dict[Hashable, str]] = {column: {} for column in UNIQUE_COLUMNS}

    def find(self, column: str, value: Hashable) -> Machine | None:
        machine_id = self._indexes[column].get(value)
        return None if machine_id is None else self.rows[machine_id]

    def put(self, machine: Machine) -> None:
        """Add or replace a row. Raises UniqueViolationError with nothing changed."""
        values = unique_values(machine)
        for column, value in values:
            if self._indexes[column].get(value, machine.id) != machine.id:
                raise UniqueViolationError(column)
        if machine.id in self.rows:
            self.remove(machine.id)
        self.rows[machine.id] = machine
        for column, value in values:
            self._indexes[column][value] = machine.id

    def remove(self, machine_id: str) -> Machine | None:
        machine = self.rows.pop(machine_id, None)
        if machine is not None:
            for column, value in unique_values(machine):
                del self._indexes[column][value]
        return machine

    def put_claim(self, claim: Claim) -> None:
        self.remove_claim(claim.id)
        self.claims[claim.id] = claim
        self.claims_by_machine.setdefault(claim.machine_id, {})[claim.id] = claim
        self.claims_by_key[claim.public_key] = claim

    def remove_claim(self, claim_id: str) -> Claim | None:
        claim = self.claims.pop(claim_id, None)
        if claim is not None:
            del self.claims_by_key[claim.public_key]
            of_machine = self.claims_by_machine[claim.machine_id]
            del of_machine[claim_id]
            if not of_machine:
                del self.claims_by_machine[claim.machine_id]
        return claim


class _RowChanges:
    """A transaction's changes of machine rows and claims. Changes the tables immediately and records how to undo that."""

    def __init__(self, table: _Table) -> None:
        self._table = table
        self._before: list[tuple[str, Machine | None]] = []
        self._claims_before: list[tuple[str, Claim | None]] = []
        self._bans_before: list[tuple[Ban, BanGrounds | None]] = []
        self._principals_before = table.principals
        self.audited: list[AuditEntry] = []
        self._server_before = table.server
        self.changes: list[Change] = []
        self.happened: list[HistoryEntry] = []

    @cached_property
    def tokens(self) -> MemoryTokens:
        return MemoryTokens(self._table.tokens, self.changes)

    @cached_property
    def ownership(self) -> MemoryOwnership:
        return MemoryOwnership(self._table.ownership, self.changes)

    def expect(self, node_uuid: str, public_key: PublicKey, bans: Iterable[Ban] = (), tokens: Iterable[TokenKey] = ()) -> None:
        """Everything is already in memory."""

    async def machine(self, machine_id: str) -> Machine | None:
        return self._table.rows.get(machine_id)

    async def machine_by_uuid(self, node_uuid: str) -> Machine | None:
        return self._table.find("node_uuid", node_uuid)

    async def machine_by_key(self, public_key: PublicKey) -> Machine | None:
        return self._table.find("public_key", public_key)

    async def machine_by_name(self, name: str) -> Machine | None:
        return self._table.find("name", name)

    async def insert(self, machine: Machine) -> Machine:
        if machine.id in self._table.rows:
            raise UniqueViolationError("id")
        return self._put(machine if machine.revision == 1 else replace(machine, revision=1), None)

    async def update(self, machine: Machine) -> Machine:
        old = self._table.rows.get(machine.id)
        if old is None:
            raise StoreError("there is no such machine to update")
        if old.token_id is not None and old.token_id != machine.token_id:
            self.tokens.release(old.token_id, machine.id)
        return self._put(replace(machine, revision=old.revision + 1), old)

    def _put(self, machine: Machine, old: Machine | None) -> Machine:
        self._table.put(machine)
        self._before.append((machine.id, old))
        self.changes.append(MachineChanged(machine=machine))
        return machine

    async def delete(self, machine_id: str) -> Machine | None:
        machine = self._table.remove(machine_id)
        if machine is not None:
            for claim in await self.claims(machine_id):
                await self.delete_claim(claim)
            if machine.token_id is not None:
                self.tokens.release(machine.token_id, machine_id)
            self.ownership.forget(machine_id)
            self._before.append((machine_id, machine))
            self.changes.append(MachineDeleted(machine=machine))
        return machine

    async def claims(self, machine_id: str) -> Sequence[Claim]:
        return list(self._table.claims_by_machine.get(machine_id, {}).values())

    async def claim_by_key(self, public_key: PublicKey) -> Claim | None:
        return self._table.claims_by_key.get(public_key)

    async def put_claim(self, claim: Claim) -> None:
        other = self._table.claims_by_key.get(claim.public_key)
        if other is not None and other.id != claim.id:
            raise UniqueViolationError("public_key")
        self._claims_before.append((claim.id, self._table.claims.get(claim.id)))
        self._table.put_claim(claim)
        self.changes.append(ClaimChanged(claim=claim, is_over=False))

    async def delete_claim(self, claim: Claim) -> None:
        found = self._table.remove_claim(claim.id)
        if found is not None:
            self._claims_before.append((found.id, found))
            self.changes.append(ClaimChanged(claim=found, is_over=True))


class _MemoryTransaction(_RowChanges):
    """See `Transaction`."""

    async def is_banned(self, *bans: Ban) -> bool:
        return not self._table.banned.keys().isdisjoint(bans)

    async def set_banned(self, ban: Ban, banned: bool, grounds: BanGrounds | None = None) -> None:
        was = self._table.banned.get(ban)
        if (was is not None) != banned:
            self._bans_before.append((ban, was))
            self._set_banned(ban, (grounds or BanGrounds()) if banned else None)
            self.changes.append(BanChanged(ban=ban, banned=banned))

    def _set_banned(self, ban: Ban, grounds: BanGrounds | None) -> None:
        if grounds is None:
            self._table.banned.pop(ban, None)
        else:
            self._table.banned[ban] = grounds

    async def audit(self, entry: AuditEntry) -> None:
        self.audited.append(entry)

    async def principals(self) -> Sequence[Principal]:
        return list(self._table.principals.values())

    async def put_principal(self, principal: Principal) -> None:
        if any(other.name == principal.name and other.id != principal.id for other in self._table.principals.values()):
            raise UniqueViolationError("name")
        self._table.principals = {**self._table.principals, principal.id: principal}
        self.changes.append(PrincipalChanged(principal_id=principal.id))

    async def delete_principal(self, principal_id: str) -> None:
        if principal_id in self._table.principals:
            others = (other for other in self._table.principals.values() if other.id != principal_id)
            self._table.principals = {other.id: other for other in others}
            self.changes.append(PrincipalChanged(principal_id=principal_id))

    async def note(self, seen: Mapping[str, LastSeen], now: float) -> None:
        for machine_id, one in seen.items():
            machine = self._table.rows.get(machine_id)
            if machine is not None:
                self._table.put(one.of(machine, now))
                self._before.append((machine_id, machine))

    async def add_history(self, entries: Sequence[HistoryEntry]) -> None:
        self.happened += entries

    async def server(self) -> ServerRecord | None:
        return self._table.server

    async def set_server(self, record: ServerRecord, *, has_new_key: bool = False) -> None:
        self._table.server = record
        if has_new_key:
            self.changes.append(ServerKeyChanged())

    def number_audit(self) -> None:
        """Number and keep the audit entries: the transaction has succeeded."""
        for entry in self.audited:
            self._table.audit_seq += 1
            numbered = replace(entry, seq=self._table.audit_seq)
            self._table.audit.append(numbered)
            self.changes.append(AuditAdded(entry=numbered))

    def undo(self) -> None:
        self._table.server = self._server_before
        self.tokens.undo()
        self.ownership.undo()
        self._table.principals = self._principals_before
        # Remove all first, then insert: no two rows may have the same value in between.
        for machine_id, _ in self._before:
            self._table.remove(machine_id)
        restored: dict[str, Machine | None] = {}
        for machine_id, before in self._before:
            restored.setdefault(machine_id, before)
        for before in restored.values():
            if before is not None:
                self._table.put(before)
        for claim_id, claim in reversed(self._claims_before):
            self._table.remove_claim(claim_id)
            if claim is not None:
                self._table.put_claim(claim)
        for ban, was in reversed(self._bans_before):
            self._set_banned(ban, was)


class MemoryStore:
    """Rows in dictionaries. Transactions run one after another; several servers in one process may share it."""

    kind = "memory"
    is_shared = False

    def __init__(self, *, feed_limit: int = DEFAULT_FEED_LIMIT) -> None:
        """A reader of `changes` that falls `feed_limit` behind receives ChangesLost."""
        self._table = _Table()
        self._feeds = Feeds(feed_limit)
        self._history = MemoryHistory()
        self._lock = asyncio.Lock()
        self.sealer = Sealer(GivenKey(os.urandom(KEY_BYTES)))

    def time(self) -> float:
        return time.time()

    async def transact(self, work: Work[T]) -> T:
        async with self._lock:
            transaction = _MemoryTransaction(self._table)
            try:
                result = await work(transaction)
            except BaseException:
                transaction.undo()
                raise
            self._history.add(transaction.happened)
            transaction.number_audit()
            if transaction.changes:
                self._feeds.publish(transaction.changes)
        return result

    async def transact_urgently(self, work: Work[T]) -> T:
        return await self.transact(work)

    async def machines(self) -> AsyncIterator[Machine]:
        for machine in list(self._table.rows.values()):
            yield machine

    async def owners(self, server_id: str | None = None) -> AsyncIterator[Ownership]:
        for owner in list(self._table.ownership.owners.values()):
            if server_id in (None, owner.server_id):
                yield owner

    async def bans(self) -> Mapping[Ban, BanGrounds]:
        return dict(self._table.banned)

    async def all_claims(self) -> Sequence[Claim]:
        return list(self._table.claims.values())

    async def history(self, query: HistoryQuery) -> Sequence[HistoryEntry]:
        return await self._history.find(query)

    async def delete_history(self, query: HistoryQuery) -> int:
        return await self._history.delete(query)

    async def prune_history(self, bounds: HistoryBounds) -> int:
        return await self._history.prune(bounds)

    async def tokens(self, after: str = "", limit: int = 1000) -> Sequence[JoinToken]:
        return self._table.tokens.page(after, limit)

    async def use_counts(self, token_ids: Collection[str], now: float) -> Mapping[str, int]:
        return self._table.tokens.count(token_ids, now)

    async def audit_entries(self, query: AuditQuery) -> Sequence[AuditEntry]:
        entries = reversed(self._table.audit) if query.newest_first else iter(self._table.audit)
        return list(islice((entry for entry in entries if query.matches(entry)), query.limit))

    async def prune_audit(self, before: float, most: int) -> int:
        count = 0
        while count < most and self._table.audit and self._table.audit[0].at < before:
            self._table.audit.popleft()
            count += 1
        return count

    async def note_principals(self, used: Mapping[str, tuple[float, str]]) -> None:
        async with self._lock:
            for principal_id, (at, source) in used.items():
                if (known := self._table.principals.get(principal_id)) is not None:
                    noted = replace(known, last_used_at=at, last_source=source)
                    self._table.principals = {**self._table.principals, principal_id: noted}

    def changes(self, wanted: Wanted | None = None) -> AbstractAsyncContextManager[AsyncIterator[Change]]:
        return self._feeds.follow(wanted)
