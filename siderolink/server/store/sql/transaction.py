"""One work's transaction within a batch: reads the stored rows and buffers its changes until the batch commits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from siderolink.common.errors import StoreError
from siderolink.common.keys import PublicKey
from siderolink.server.store.audit import AuditEntry, Principal
from siderolink.server.store.feed import (
    AuditAdded,
    BanChanged,
    Change,
    ClaimChanged,
    MachineChanged,
    MachineDeleted,
    PrincipalChanged,
    ServerKeyChanged,
)
from siderolink.server.store.history import HistoryEntry
from siderolink.server.store.rows import (
    Ban,
    BanGrounds,
    Claim,
    LastSeen,
    Machine,
    ServerRecord,
    UniqueViolationError,
    unique_values,
)
from siderolink.server.store.sql.batch_reads import BAN, CLAIM_KEY, CLAIMS_OF, HISTORY, PRINCIPALS, SERVER, TOKEN, Key, Reads
from siderolink.server.store.sql.ownership_rows import SqlOwnership
from siderolink.server.store.sql.token_rows import SqlTokens
from siderolink.server.store.tokens import TokenKey


class _RowChanges:
    """A transaction's changes of machine rows and claims. Its reads and writes show conflicts with others of the batch."""

    def __init__(self, reader: Reads, *, is_checked: bool) -> None:
        """Unless `is_checked`, unique values are not looked up first; the database refuses duplicates."""
        self._reader = reader
        self._is_checked = is_checked
        self.reads: set[Key] = set()
        self.writes: set[Key] = set()
        self.rows: dict[str, Machine | None] = {}
        """New values of rows by id; None deletes the row."""
        self.stored: set[str] = set()
        """Ids of rows found in the database."""
        self.claimed: dict[str, Claim | None] = {}
        """New values of claims by id; None deletes the claim."""
        self.bans: dict[Ban, BanGrounds | None] = {}
        """Bans to make, or to lift (None)."""
        self.named: dict[str, Principal | None] = {}
        """New values of principals by id; None deletes the principal."""
        self.audited: list[AuditEntry] = []
        self.record: ServerRecord | None = None
        self.seen: dict[str, LastSeen] = {}
        self.noted_at = 0.0
        """When `seen` was noted, in Unix time."""
        self.happened: list[HistoryEntry] = []
        self.changes: list[Change] = []
        self.tokens = SqlTokens(reader, self.reads, self.writes, self.changes)
        self.ownership = SqlOwnership(reader, self.reads, self.writes, self.changes)

    async def machine(self, machine_id: str) -> Machine | None:
        if machine_id in self.rows:
            return self.rows[machine_id]
        return await self._find(("id", machine_id))

    async def machine_by_uuid(self, node_uuid: str) -> Machine | None:
        return await self._find(("node_uuid", node_uuid))

    async def machine_by_key(self, public_key: PublicKey) -> Machine | None:
        return await self._find(("public_key", public_key))

    async def _find(self, key: Key) -> Machine | None:
        row = self._find_here(key)
        if row is not None:
            return row
        self.reads.add(key)
        found = await self._reader.read(key)
        if not isinstance(found, Machine) or found.id in self.rows:
            return None
        self.reads.add(("id", found.id))
        self.stored.add(found.id)
        return found

    def expect(self, node_uuid: str, public_key: PublicKey, bans: Iterable[Ban] = (), tokens: Iterable[TokenKey] = ()) -> None:
        wanted: list[Key] = [("node_uuid", node_uuid), ("public_key", public_key), (CLAIM_KEY, public_key)]
        wanted += [(BAN, ban) for ban in bans]
        self._reader.want(wanted + [(TOKEN + column.value, value) for column, value in tokens])

    def _find_here(self, key: Key) -> Machine | None:
        """A row with this value that this transaction has written."""
        if not self.rows:
            return None
        column, value = key
        for row in self.rows.values():
            if row is not None and getattr(row, column) == value and (column != "node_uuid" or row.is_accepted):
                return row
        return None

    async def machine_by_name(self, name: str) -> Machine | None:
        return await self._find(("name", name))

    async def insert(self, machine: Machine) -> Machine:
        if self._is_checked:
            self._reader.want((("id", machine.id), *unique_values(machine)))
        if (await self.machine(machine.id) if self._is_checked else self.rows.get(machine.id)) is not None:
            raise UniqueViolationError("id")
        return await self._put(machine if machine.revision == 1 else replace(machine, revision=1), None)

    async def update(self, machine: Machine) -> Machine:
        old = await self.machine(machine.id)
        if old is None:
            raise StoreError("there is no such machine to update")
        if old.token_id is not None and old.token_id != machine.token_id:
            self.tokens.release(old.token_id, machine.id)
        return await self._put(replace(machine, revision=old.revision + 1), old)

    async def _put(self, machine: Machine, old: Machine | None) -> Machine:
        before = () if old is None else unique_values(old)
        values = unique_values(machine)
        new = [key for key in values if key not in before]
        if self._is_checked:
            self._reader.want(new)
        for key in new:
            other = await self._find(key) if self._is_checked else self._find_here(key)
            if other is not None and other.id != machine.id:
                raise UniqueViolationError(key[0])
        self._write(machine.id, machine, (*before, *values))
        self.changes.append(MachineChanged(machine=machine))
        return machine

    async def delete(self, machine_id: str) -> Machine | None:
        machine = await self.machine(machine_id)
        if machine is not None:
            for claim in await self.claims(machine_id):
                await self.delete_claim(claim)
            if machine.token_id is not None:
                self.tokens.release(machine.token_id, machine_id)
            self.ownership.forget(machine_id)
            self._write(machine_id, None, unique_values(machine))
            self.changes.append(MachineDeleted(machine=machine))
        return machine

    def _write(self, machine_id: str, machine: Machine | None, values: Iterable[Key]) -> None:
        """Write a row, or delete it (None). `values` are its unique ones, before and after."""
        self.writes.add(("id", machine_id))
        self.writes.update(values)
        self.rows[machine_id] = machine

    async def claims(self, machine_id: str) -> Sequence[Claim]:
        self.reads.add((CLAIMS_OF, machine_id))
        stored = await self._reader.read((CLAIMS_OF, machine_id))
        known = [one for one in stored if isinstance(one, Claim)] if isinstance(stored, Sequence) else []
        found = [claim for claim in known if claim.id not in self.claimed]
        return found + [claim for claim in self.claimed.values() if claim is not None and claim.machine_id == machine_id]

    async def claim_by_key(self, public_key: PublicKey) -> Claim | None:
        for claim in self.claimed.values():
            if claim is not None and claim.public_key == public_key:
                return claim
        self.reads.add((CLAIM_KEY, public_key))
        found = await self._reader.read((CLAIM_KEY, public_key))
        return found if isinstance(found, Claim) and found.id not in self.claimed else None

    async def put_claim(self, claim: Claim) -> None:
        other = await self.claim_by_key(claim.public_key)
        if other is not None and other.id != claim.id:
            raise UniqueViolationError("public_key")
        self._write_claim(claim, claim)
        self.changes.append(ClaimChanged(claim=claim, is_over=False))

    async def delete_claim(self, claim: Claim) -> None:
        found = await self.claim_by_key(claim.public_key)
        if found is not None and found.id == claim.id:
            self._write_claim(found, None)
            self.changes.append(ClaimChanged(claim=found, is_over=True))

    def _write_claim(self, claim: Claim, new: Claim | None) -> None:
        self.writes |= {(CLAIMS_OF, claim.machine_id), (CLAIM_KEY, claim.public_key)}
        self.claimed[claim.id] = new


class SqlTransaction(_RowChanges):
    """See `Transaction`."""

    async def is_banned(self, *bans: Ban) -> bool:
        keys = [(BAN, ban) for ban in bans if ban not in self.bans]
        self.reads.update(keys)
        self._reader.want(keys)
        for key in keys:
            if await self._reader.read(key) is not None:
                return True
        return any(self.bans[ban] is not None for ban in self.bans.keys() & bans)

    async def set_banned(self, ban: Ban, banned: bool, grounds: BanGrounds | None = None) -> None:
        if await self.is_banned(ban) != banned:
            self.writes.add((BAN, ban))
            self.bans[ban] = (grounds or BanGrounds()) if banned else None
            self.changes.append(BanChanged(ban=ban, banned=banned))

    async def audit(self, entry: AuditEntry) -> None:
        self.audited.append(entry)

    def number_audit(self, numbers: Iterator[int]) -> None:
        """Number the entries and publish them to the feed."""
        self.audited = [replace(entry, seq=seq) for entry, seq in zip(self.audited, numbers, strict=False)]
        self.changes += [AuditAdded(entry=entry) for entry in self.audited]

    @property
    def has_written(self) -> bool:
        """Whether there is anything to commit."""
        return bool(self.writes or self.audited)

    async def principals(self) -> Sequence[Principal]:
        self.reads.add(PRINCIPALS)
        found = await self._reader.read(PRINCIPALS)
        known = {one.id: one for one in found if isinstance(one, Principal)} if isinstance(found, Sequence) else {}
        return [one for one in (known | self.named).values() if one is not None]

    async def put_principal(self, principal: Principal) -> None:
        if any(other.name == principal.name and other.id != principal.id for other in await self.principals()):
            raise UniqueViolationError("name")
        self._write_principal(principal.id, principal)

    async def delete_principal(self, principal_id: str) -> None:
        if any(other.id == principal_id for other in await self.principals()):
            self._write_principal(principal_id, None)

    def _write_principal(self, principal_id: str, principal: Principal | None) -> None:
        self.writes.add(PRINCIPALS)
        self.named[principal_id] = principal
        self.changes.append(PrincipalChanged(principal_id=principal_id))

    async def note(self, seen: Mapping[str, LastSeen], now: float) -> None:
        self.writes |= {("id", machine_id) for machine_id in seen}
        self.seen |= seen
        self.noted_at = now

    async def add_history(self, entries: Sequence[HistoryEntry]) -> None:
        self.writes.add((HISTORY, id(self)))
        self.happened += entries

    async def server(self) -> ServerRecord | None:
        if self.record is not None:
            return self.record
        self.reads.add(SERVER)
        found = await self._reader.read(SERVER)
        return found if isinstance(found, ServerRecord) else None

    async def set_server(self, record: ServerRecord, *, has_new_key: bool = False) -> None:
        self.writes.add(SERVER)
        self.record = record
        if has_new_key:
            self.changes.append(ServerKeyChanged())
