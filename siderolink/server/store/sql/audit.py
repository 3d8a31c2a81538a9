"""The audit and the principals in the database: the same statements for SQLite and Postgres."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Float, Integer, Select, Text, bindparam, delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from siderolink.common.errors import StoreError
from siderolink.server.store.audit import Actor, AuditEntry, AuditQuery, ForwardGrant, Principal, Role
from siderolink.server.store.sql.tables import audit, principals


def values(entry: AuditEntry) -> dict[str, object]:
    """All columns except the number."""
    return {
        "at": entry.at,
        "actor": entry.actor.name,
        "role": "" if entry.actor.role is None else entry.actor.role.value,
        "source": entry.actor.source,
        "action": entry.action,
        "object_kind": entry.object_kind,
        "object_id": entry.object_id,
        "object_name": entry.object_name,
        "before": json.dumps(dict(entry.before)),
        "after": json.dumps(dict(entry.after)),
    }


def read_entry(row: Mapping[Any, Any]) -> AuditEntry:
    """Raises StoreError for a row that no server wrote."""
    try:
        return AuditEntry(
            seq=row["seq"],
            at=row["at"],
            actor=Actor(name=row["actor"], role=Role(row["role"]) if row["role"] else None, source=row["source"]),
            action=row["action"],
            object_kind=row["object_kind"],
            object_id=row["object_id"],
            object_name=row["object_name"],
            before=json.loads(row["before"]),
            after=json.loads(row["after"]),
        )
    except (ValueError, TypeError):
        raise StoreError("the state contains an invalid audit record") from None


def find(query: AuditQuery) -> Select[Any]:
    """The rows that a query selects, in the query's order."""
    row = audit.c
    wanted = [row.seq > (query.after_seq or 0)]
    if query.actor:
        wanted.append(row.actor == query.actor)
    if query.action:
        wanted.append(row.action.startswith(query.action, autoescape=True))
    if query.object:
        wanted.append(or_(row.object_id == query.object, row.object_name == query.object))
    if query.since is not None:
        wanted.append(row.at >= query.since)
    if query.until is not None:
        wanted.append(row.at < query.until)
    if query.before_seq is not None:
        wanted.append(row.seq < query.before_seq)
    order = row.seq.desc() if query.newest_first else row.seq.asc()
    return select(audit).where(*wanted).order_by(order).limit(query.limit)


_OLDEST = (
    select(audit.c.seq)
    .where(audit.c.at < bindparam("time", type_=Float))
    .order_by(audit.c.seq)
    .limit(bindparam("most", type_=Integer))
)
_PRUNE = delete(audit).where(audit.c.seq.in_(_OLDEST))
_NOTE = (
    update(principals)
    .values(last_used_at=bindparam("used_at", type_=Float), last_source=bindparam("used_from", type_=Text))
    .where(principals.c.id == bindparam("principal"))
)


async def prune(connection: AsyncConnection, before: float, most: int) -> int:
    """Remove up to `most` of the oldest entries from before this time; returns how many."""
    return (await connection.execute(_PRUNE, {"time": before, "most": most})).rowcount


async def note_principals(connection: AsyncConnection, used: Mapping[str, tuple[float, str]]) -> int:
    """Note when, and from where, principals (by id) last called."""
    rows = [{"principal": name, "used_at": at, "used_from": source} for name, (at, source) in sorted(used.items())]
    if rows:
        await connection.execute(_NOTE, rows)
    return len(rows)


def read_principal(row: Mapping[Any, Any]) -> Principal:
    """Raises StoreError for a row that no server wrote."""
    fields = dict(row)
    try:
        grants = tuple(ForwardGrant.parse(one) for one in json.loads(fields.pop("grants")))
        return Principal(role=Role(fields.pop("role")), grants=grants, **fields)
    except (ValueError, TypeError, AttributeError):
        raise StoreError("the state contains an invalid principal record") from None
