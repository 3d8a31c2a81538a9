"""The history in the database: the same statements for SQLite and Postgres.

Entries are counted and deleted in pieces of a few rows, each in its own transaction: others wait for one piece at most."""

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from sqlalchemy import Delete, Select, delete, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import ColumnElement

from siderolink.common.errors import StoreError
from siderolink.common.tasks import in_parts
from siderolink.server.store.history import NO_MACHINE, HistoryBounds, HistoryEntry, HistoryKind, HistoryQuery
from siderolink.server.store.sql.cells import cells_of
from siderolink.server.store.sql.tables import history as table

T = TypeVar("T")

ROWS_COUNTED = 2000
"""Entries counted per piece."""
ROWS_DELETED = 200
"""Entries deleted per piece."""
_MACHINES = 10
"""Machines whose entries are deleted per piece."""


def values(entries: Sequence[HistoryEntry]) -> list[dict[str, Any]]:
    return [cells_of(entry, table) for entry in entries]


def read_entry(row: Mapping[Any, Any]) -> HistoryEntry:
    """Raises StoreError for a row that no server wrote."""
    fields = dict(row)
    try:
        return HistoryEntry(kind=HistoryKind(fields.pop("kind")), **fields)
    except (ValueError, TypeError):
        raise StoreError("the state contains an invalid entry of the history") from None


def find(query: HistoryQuery) -> Select[Any]:
    """The entries that the query selects, in the query's order."""
    order = table.c.seq.desc() if query.after_seq is None else table.c.seq
    return select(table).where(*_conditions(query)).order_by(order).limit(query.limit)


def _conditions(query: HistoryQuery) -> list[ColumnElement[bool]]:
    row = table.c
    named: list[ColumnElement[bool]] = []
    if query.machine_id is not None:
        named.append(row.machine_id == query.machine_id)
    if query.node_uuid is not None:
        named.append(row.node_uuid == query.node_uuid)
    found: list[ColumnElement[bool]] = [or_(*named)] if named else []
    if query.kinds:
        found.append(row.kind.in_([kind.value for kind in query.kinds]))
    if query.since is not None:
        found.append(row.at >= query.since)
    if query.until is not None:
        found.append(row.at < query.until)
    if query.before_seq is not None:
        found.append(row.seq < query.before_seq)
    if query.after_seq is not None:
        found.append(row.seq > query.after_seq)
    return found


class InTransaction(Protocol):
    """Runs a piece of work in a transaction of its own. Raises StoreError."""

    async def __call__(self, piece: Callable[[AsyncConnection], Coroutine[Any, Any, T]], /) -> T: ...


async def remove(run: InTransaction, query: HistoryQuery) -> int:
    """Delete the entries that the query selects, ignoring its limit; returns how many."""
    return await _remove(run, select(table.c.seq).where(*_conditions(query)))


async def prune(run: InTransaction, bounds: HistoryBounds) -> int:
    """Delete entries that are too old or too many; returns how many."""
    row = table.c
    removed = await _remove(run, select(row.seq).where(row.at < bounds.since).order_by(row.at))
    left = 0
    crowded: list[tuple[str, int]] = []
    async for machine_id, found in _count(run):
        left += found
        if (surplus := found - bounds.of(machine_id)) > 0:
            crowded.append((machine_id, surplus))
    count = await _thin(run, crowded)
    left, removed = left - count, removed + count
    if left > bounds.total:
        removed += await _remove(run, select(row.seq).order_by(row.seq), left - bounds.total)
    return removed


async def _thin(run: InTransaction, crowded: Sequence[tuple[str, int]]) -> int:
    """Delete the given number of oldest entries of each machine, several machines per piece; returns how many."""
    row, each = table.c, max(1, ROWS_DELETED // _MACHINES)
    steps = [(name, min(each, surplus - done)) for name, surplus in crowded for done in range(0, surplus, each)]
    removed = 0
    for part in in_parts(steps, _MACHINES):

        async def piece(connection: AsyncConnection, part: Sequence[tuple[str, int]] = part) -> int:
            count = 0
            for machine_id, size in part:
                oldest = select(row.seq).where(row.machine_id == machine_id).order_by(row.seq).limit(size)
                count += (await connection.execute(delete(table).where(row.seq.in_(oldest)))).rowcount
            return count

        removed += await run(piece)
    return removed


async def _count(run: InTransaction) -> AsyncIterator[tuple[str, int]]:
    """The number of entries under each machine id."""
    row = table.c
    machine_id, last, count = NO_MACHINE, 0, 0
    is_over = False
    while not is_over:
        after = tuple_(row.machine_id, row.seq) > (machine_id, last)
        ordered = select(row.machine_id, row.seq).where(after).order_by(row.machine_id, row.seq)
        part = ordered.limit(ROWS_COUNTED).subquery()
        counts = select(part.c.machine_id, func.count(), func.max(part.c.seq)).group_by(part.c.machine_id)
        found = await run(_all_of(counts.order_by(part.c.machine_id)))
        is_over = sum(number for _, number, _ in found) < ROWS_COUNTED
        for name, number, seq in found:
            if name != machine_id and count:
                yield machine_id, count
                count = 0
            machine_id, last, count = name, seq, count + number
    if count:
        yield machine_id, count


def _all_of(statement: Select[Any]) -> Callable[[AsyncConnection], Coroutine[Any, Any, Sequence[Any]]]:
    async def read(connection: AsyncConnection) -> Sequence[Any]:
        found: Sequence[Any] = (await connection.execute(statement)).all()
        return found

    return read


async def _remove(run: InTransaction, seqs: Select[Any], most: int | None = None) -> int:
    """Delete the entries with these numbers, or the first `most` of them; returns how many."""
    removed = 0
    while True:
        size = ROWS_DELETED if most is None else min(ROWS_DELETED, most - removed)
        statement = delete(table).where(table.c.seq.in_(seqs.limit(size)))

        async def piece(connection: AsyncConnection, statement: Delete = statement) -> int:
            return (await connection.execute(statement)).rowcount

        count = await run(piece)
        removed += count
        if count < size or removed == most:
            return removed
