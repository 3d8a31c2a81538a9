"""One work, one database transaction: read without locks, then locked, looked at again, written and committed.

A work keeps its changes to itself until it has run. Then everything that it asked for and would change is locked: what is
absent, and what is a set, by advisory locks of the transaction; rows by themselves. All take the locks in the same order, so
that nobody waits in a circle. What was read is read again; where it has changed, the work runs again. New values that must
be unique (random ids and addresses) are not looked up first: the unique constraints refuse a repeated one, and the work runs
again and looks them up. Whoever ran in vain takes the locks of the last try before it reads.
"""

import random
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import anyio
from sqlalchemy import and_, bindparam, delete, func, insert, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as insert_or
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import ColumnElement

from siderolink.common.errors import StoreError, StoreUnavailableError
from siderolink.server.store.audit import Principal
from siderolink.server.store.base import (
    Ban,
    BanGrounds,
    Change,
    Claim,
    Machine,
    MachineAdmission,
    ServerRecord,
    Work,
)
from siderolink.server.store.sql import audit, history, tables
from siderolink.server.store.sql.postgres.database import ContendedError, Database
from siderolink.server.store.sql.postgres.feed import write_changes
from siderolink.server.store.sql.reading import Found, Key, Wanted, fetch, is_optimistic
from siderolink.server.store.sql.token_rows import SqlTokens
from siderolink.server.store.sql.transaction import SqlTransaction
from siderolink.server.store.tokens import JoinToken, TokenUse

T = TypeVar("T")

ATTEMPTS = 20
_AWAY_ATTEMPTS = 3
_LOCK = text("SELECT pg_advisory_xact_lock(key) FROM unnest(CAST(:keys AS bigint[])) AS key")
_MACHINE_VALUES: dict[str, Any] = {
    column.name: bindparam(f"new_{column.name}") for column in tables.machines.columns if column.name != "id"
}
_UPDATE_MACHINE = update(tables.machines).where(tables.machines.c.id == bindparam("row")).values(_MACHINE_VALUES)
# the overlay address is never null; no address has 32 bytes
_FREE_MACHINE = (
    update(tables.machines)
    .where(tables.machines.c.id == bindparam("row"))
    .values(
        public_key=None,
        virtual_address=None,
        name=None,
        admission=MachineAdmission.PENDING.value,
        overlay_address=func.sha256(func.convert_to(tables.machines.c.id, "UTF8")),
    )
)
_NOTE = tables.note()
_RELEASE_USE, _TAKE_SLOT = tables.release_use(), tables.take_slot()


def _number(key: Key) -> int:
    """What an advisory lock calls a key."""
    name, value = key
    cell = tables.cell(value)
    data = cell if isinstance(cell, bytes) else repr(cell).encode()
    return int.from_bytes(blake2b(name.encode() + b"\0" + data, digest_size=8).digest(), signed=True)


async def _lock(connection: AsyncConnection, keys: Iterable[Key]) -> None:
    numbers = sorted({_number(key) for key in keys})
    if numbers:
        await connection.execute(_LOCK, {"keys": numbers})


def _matches(table: Any, wanted: Wanted) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    for name, values in wanted.items():
        match = table.c[name].in_([tables.cell(value) for value in values])
        if table is tables.machines and name == "node_uuid":
            match = and_(match, table.c.admission == MachineAdmission.ACCEPTED.value)
        found.append(match)
    return found


class PostgresFinder:
    """See `Finder`."""

    def __init__(self, connection: AsyncConnection, *, is_locking: bool = False) -> None:
        """`is_locking`: machines' rows are locked until the transaction ends."""
        self._connection = connection
        self._is_locking = is_locking

    async def machines(self, wanted: Wanted) -> list[Machine]:
        statement = select(tables.machines).where(or_(*_matches(tables.machines, wanted)))
        if self._is_locking:
            statement = statement.order_by(tables.machines.c.id).with_for_update()
        return [tables.read_machine(row) for row in (await self._connection.execute(statement)).mappings()]

    async def claims(self, wanted: Wanted) -> list[Claim]:
        statement = select(tables.claims).where(or_(*_matches(tables.claims, wanted)))
        return [tables.read_claim(row) for row in (await self._connection.execute(statement)).mappings()]

    async def bans(self, wanted: list[Hashable]) -> list[Ban]:
        columns, bans = tables.bans.c, [ban for ban in wanted if isinstance(ban, Ban)]
        matches = (and_(columns.kind == ban.kind.value, columns.value == ban.value) for ban in bans)
        rows = await self._connection.execute(select(columns.kind, columns.value).where(or_(*matches)))
        return [tables.read_ban(row.kind, row.value) for row in rows]

    async def tokens(self, wanted: Wanted) -> list[JoinToken]:
        statement = select(tables.join_tokens).where(or_(*_matches(tables.join_tokens, wanted)))
        return [tables.read_token(row) for row in (await self._connection.execute(statement)).mappings()]

    async def uses(self, token_ids: list[Hashable]) -> list[TokenUse]:
        statement = select(tables.token_uses).where(tables.token_uses.c.token_id.in_(token_ids))
        return [TokenUse(**row) for row in (await self._connection.execute(statement)).mappings()]

    async def principals(self) -> list[Principal]:
        rows = await self._connection.execute(select(tables.principals))
        return [tables.read_principal(row) for row in rows.mappings()]

    async def server(self) -> ServerRecord | None:
        row = (await self._connection.execute(select(tables.server))).mappings().first()
        return None if row is None else tables.read_server(row)


class PostgresReads:
    """See `Reads`: what one transaction read, each key once."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection
        self._wanted: set[Key] = set()
        self.answers: dict[Key, Found] = {}
        self.rounds = 0

    def want(self, keys: Iterable[Key]) -> None:
        self._wanted |= {key for key in keys if key not in self.answers}

    async def read(self, key: Key) -> Found:
        if key not in self.answers:
            wanted, self._wanted = [*(self._wanted | {key})], set()
            self.rounds += 1
            found = await fetch(PostgresFinder(self._connection), wanted)
            for one in wanted:
                answer = self.answers[one] = found.get(one)
                if isinstance(answer, Machine):
                    self.answers.setdefault(("id", answer.id), answer)
        return self.answers[key]

    async def have_changed(self, keys: Iterable[Key], *, is_locking: bool) -> bool:
        """Whether the answers to these keys are others now. Locked rows stay as they are until the transaction ends."""
        read = [key for key in keys if key in self.answers]
        found = await fetch(PostgresFinder(self._connection, is_locking=is_locking), read)
        return any(found.get(key) != self.answers[key] for key in read)


class _Attempt:
    """One try of one work."""

    def __init__(self, *, is_checked: bool, locks: Collection[Key]) -> None:
        self._is_checked = is_checked
        self.locks = set(locks)
        """What the next try shall lock before it reads."""
        self.is_committing = False
        self.has_ended = False
        self.changes: Sequence[Change] = ()

    async def run(self, connection: AsyncConnection, work: Work[T]) -> T:
        await _lock(connection, self.locks)
        reads = PostgresReads(connection)
        transaction = SqlTransaction(reads, is_checked=self._is_checked)
        result = await work(transaction)
        read = {key for key in transaction.reads if key in transaction.writes or not is_optimistic(key)}
        keys = read | (transaction.writes - {("id", machine_id) for machine_id in transaction.seen})
        if transaction.has_written:
            self.locks |= keys
            await _lock(connection, keys)
        is_read_again = transaction.has_written or reads.rounds > 1
        if is_read_again and await reads.have_changed(read, is_locking=transaction.has_written):
            raise ContendedError("what was read has changed")
        if transaction.has_written:
            await _write(connection, transaction)
            self.is_committing = True
            await connection.commit()
        self.changes = transaction.changes
        return result


async def run_work(database: Database, work: Work[T]) -> tuple[T, Sequence[Change]]:
    """The work's result and its changes, once they are committed. Raises what the work raises, or StoreError."""
    attempt = _Attempt(is_checked=False, locks=())
    is_checked, away = False, 0
    for number in range(ATTEMPTS):
        attempt = _Attempt(is_checked=is_checked, locks=attempt.locks)
        try:
            async with database.connect() as connection:
                return await attempt.run(connection, work), attempt.changes
        except ContendedError as error:
            if error.is_unique and is_checked and number > 2:
                raise StoreError("the database holds a value that may not be repeated") from error
            is_checked = is_checked or error.is_unique
        except StoreUnavailableError:
            away += 1
            # a commit whose answer was lost may have happened
            if attempt.is_committing or away == _AWAY_ATTEMPTS:
                raise
            await anyio.sleep(0.1 * 2**away)
        await anyio.sleep(random.uniform(0, 0.002 * number))
    raise StoreUnavailableError("the database is too busy: others changed the same rows again and again")


async def _write(connection: AsyncConnection, transaction: SqlTransaction) -> None:
    await _write_machines(connection, transaction.rows, transaction.stored)
    if transaction.claimed:
        await connection.execute(delete(tables.claims).where(tables.claims.c.id.in_(list(transaction.claimed))))
        claims = [tables.cells(claim, tables.claims) for claim in transaction.claimed.values() if claim is not None]
        if claims:
            await connection.execute(insert(tables.claims), claims)
    await _write_bans(connection, transaction.bans)
    if transaction.tokens.has_changes:
        await _write_tokens(connection, transaction.tokens)
    if transaction.record is not None:
        values = tables.server_values(transaction.record)
        await connection.execute(
            insert_or(tables.server).values(values).on_conflict_do_update(index_elements=["id"], set_=values)
        )
    if transaction.named:
        await _write_principals(connection, transaction.named)
    if transaction.audited:
        await _write_audit(connection, transaction)
    if transaction.seen:
        await connection.execute(_NOTE, tables.note_values(transaction.seen))
    if transaction.happened:
        await connection.execute(history.INSERT, history.values(transaction.happened))
    if transaction.changes:
        await write_changes(connection, transaction.changes)


async def _write_machines(connection: AsyncConnection, rows: Mapping[str, Machine | None], stored: set[str]) -> None:
    gone = [machine_id for machine_id, row in rows.items() if row is None and machine_id in stored]
    new = [row for row in rows.values() if row is not None and row.id not in stored]
    changed = [row for row in rows.values() if row is not None and row.id in stored]
    if gone:
        await connection.execute(delete(tables.machines).where(tables.machines.c.id.in_(gone)))
    if changed and len(rows) > 1:
        # All values out first, then in: on the way no two rows may hold the same.
        await connection.execute(_FREE_MACHINE, [{"row": row.id} for row in changed])
    if changed:
        cells = (tables.cells(row, tables.machines) for row in changed)
        values = [{"row": row["id"]} | {f"new_{name}": value for name, value in row.items()} for row in cells]
        await connection.execute(_UPDATE_MACHINE, values)
    if new:
        await connection.execute(insert(tables.machines), [tables.cells(row, tables.machines) for row in new])


async def _write_bans(connection: AsyncConnection, bans: Mapping[Ban, BanGrounds | None]) -> None:
    columns = tables.bans.c
    for ban, grounds in bans.items():
        if grounds is not None:
            made = insert_or(tables.bans).values(tables.ban_values(ban, grounds))
            await connection.execute(made.on_conflict_do_nothing())
        else:
            await connection.execute(delete(tables.bans).where(columns.kind == ban.kind.value, columns.value == ban.value))


async def _write_tokens(connection: AsyncConnection, changed: SqlTokens) -> None:
    """Raises ContendedError where another transaction has taken the slot of a use."""
    rows, uses = tables.join_tokens, tables.token_uses
    if changed.tokens:
        await connection.execute(delete(rows).where(rows.c.id.in_(list(changed.tokens))))
        gone = [token_id for token_id, token in changed.tokens.items() if token is None]
        await connection.execute(delete(uses).where(uses.c.token_id.in_(gone)))
        new = [tables.cells(token, rows) for token in changed.tokens.values() if token is not None]
        if new:
            await connection.execute(insert(rows), new)
    if changed.released:
        await connection.execute(_RELEASE_USE, tables.released_uses(changed.released))
    if changed.put_uses:
        await connection.execute(_TAKE_SLOT, tables.taken_slots(changed.put_uses.values()))
        values = [tables.cells(use, uses) for use in changed.put_uses.values()]
        made = insert_or(uses).values(values).on_conflict_do_nothing().returning(uses.c.slot)
        if len((await connection.execute(made)).all()) != len(values):
            raise ContendedError("a use of a token was taken meanwhile")


async def _write_principals(connection: AsyncConnection, principals: Mapping[str, Principal | None]) -> None:
    await connection.execute(delete(tables.principals).where(tables.principals.c.id.in_(list(principals))))
    rows = [tables.cells(one, tables.principals) for one in principals.values() if one is not None]
    if rows:
        await connection.execute(insert(tables.principals), rows)


async def _write_audit(connection: AsyncConnection, transaction: SqlTransaction) -> None:
    add = insert(tables.audit).returning(tables.audit.c.seq)
    numbers = [(await connection.execute(add.values(audit.values(entry)))).scalar_one() for entry in transaction.audited]
    transaction.number_audit(iter(numbers))
