"""The history in the database: the same statements for SQLite and Postgres, each call in a transaction of the caller's.

Pruning is done in parts of some rows, so that nobody waits long for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Select, delete, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql import ColumnElement

from siderolink.common.errors import StoreError
from siderolink.server.store.history import HistoryBounds, HistoryEntry, HistoryKind, HistoryQuery
from siderolink.server.store.sql.tables import history as table

_PART = 1000
_MACHINES = 100

INSERT = insert(table)
"""Takes what `values` gives."""


def values(entries: Sequence[HistoryEntry]) -> list[dict[str, Any]]:
    names = [column.name for column in table.columns if column.name != "seq"]
    return [{name: getattr(entry, name) for name in names} | {"kind": entry.kind.value} for entry in entries]


def read_entry(row: Mapping[Any, Any]) -> HistoryEntry:
    """Raises StoreError for a row that no server wrote."""
    fields = dict(row)
    try:
        return HistoryEntry(kind=HistoryKind(fields.pop("kind")), **fields)
    except (ValueError, TypeError):
        raise StoreError("the state contains an invalid entry of the history") from None


def find(query: HistoryQuery) -> Select[Any]:
    """The entries that are wanted, in the order in which they are."""
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


async def remove(connection: AsyncConnection, query: HistoryQuery) -> int:
    """Delete what the query takes; tells how many."""
    return (await connection.execute(delete(table).where(*_conditions(query)))).rowcount


async def prune(connection: AsyncConnection, bounds: HistoryBounds) -> int:
    """Delete up to some thousand entries of those that are too old or too many; tells how many."""
    row = table.c
    count = await _remove_all(connection, select(row.seq).where(row.at < bounds.since).order_by(row.at).limit(_PART))
    crowded = select(row.machine_id, func.count()).group_by(row.machine_id).having(func.count() > bounds.per_machine)
    for machine_id, found in (await connection.execute(crowded.limit(_MACHINES))).all():
        surplus = min(_PART, found - bounds.of(machine_id))
        if surplus > 0:
            oldest = select(row.seq).where(row.machine_id == machine_id).order_by(row.seq).limit(surplus)
            count += await _remove_all(connection, oldest)
    surplus = min(_PART, ((await connection.execute(select(func.count()).select_from(table))).scalar() or 0) - bounds.total)
    if surplus > 0:
        count += await _remove_all(connection, select(row.seq).order_by(row.seq).limit(surplus))
    return count


async def _remove_all(connection: AsyncConnection, seqs: Select[Any]) -> int:
    return (await connection.execute(delete(table).where(table.c.seq.in_(seqs)))).rowcount
