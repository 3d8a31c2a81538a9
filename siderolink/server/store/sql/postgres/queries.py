"""The statements of transactions, run directly on Postgres's driver: reads, a check that the rows are unchanged, writes.

All tables that a work needs at the same time are read in one statement, and so in one consistent view.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from psycopg import AsyncConnection as Driver
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    Insert,
    Integer,
    Table,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
    table,
    text,
    type_coerce,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as insert_or
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql import ClauseElement, ColumnElement

from siderolink.server.store.rows import MachineAdmission
from siderolink.server.store.sql import audit, history, tables
from siderolink.server.store.sql.batch_reads import Sought
from siderolink.server.store.sql.cells import cell, cells_of, names
from siderolink.server.store.sql.ownership_rows import SqlOwnership
from siderolink.server.store.sql.postgres.feed import encode_change
from siderolink.server.store.sql.queries import READERS, Statement, matches
from siderolink.server.store.sql.token_rows import SqlTokens
from siderolink.server.store.sql.transaction import SqlTransaction

Step = tuple[Statement, Sequence[Mapping[str, Any]]]
"""A statement with its parameters by name, once for each execution."""
Version = tuple[str, str]
"""A row, as table and primary key, and the transaction that wrote it."""
Shape = tuple[tuple[str, tuple[tuple[str, bool], ...]], ...]
"""Tables with the columns to search, each with whether it is searched for several values."""

_DIALECT = PGDialect_psycopg(paramstyle="format")  # type: ignore[no-untyped-call]


def statement(clause: ClauseElement) -> Statement:
    return Statement(clause, _DIALECT)


BEGIN: Step = (statement(text("BEGIN ISOLATION LEVEL READ COMMITTED")), [{}])
COMMIT: Step = (statement(text("COMMIT")), [{}])
_KEY = func.unnest(cast(bindparam("keys", type_=Text), ARRAY(BigInteger))).column_valued("key")
_LOCK = statement(select(func.count(func.pg_advisory_xact_lock(_KEY))))


def lock(numbers: Sequence[int]) -> Step:
    """Locks the numbers, in order, until the transaction ends."""
    return _LOCK, [{"keys": f"{{{','.join(map(str, numbers))}}}"}]


# --- reads


def _shape(sought: Sought) -> Shape:
    return tuple((name, tuple((column, len(of) > 1) for column, of in columns.items())) for name, columns in sought.items())


def _given(sought: Sought) -> dict[str, object]:
    given: dict[str, object] = {}
    for name, columns in sought.items():
        for key, values in columns.items():
            cells = [cell(value) for value in values]
            given[f"{name}_{key}"] = cells if len(cells) > 1 else cells[0]
    return given


def _where(table: Table, columns: Sequence[tuple[str, bool]]) -> ColumnElement[bool]:
    has_many = dict(columns)

    def is_sought(column: Column[Any]) -> ColumnElement[bool]:
        name = f"{table.name}_{column.name}"
        if has_many[column.name]:
            return column == func.any(bindparam(name, type_=ARRAY(column.type)))
        return column == bindparam(name, type_=column.type)

    return matches(table, has_many, is_sought)


def _version(table: Table) -> ColumnElement[str]:
    return cast(literal_column(f"{table.name}.xmin"), Text)


def _row(table: Table) -> ColumnElement[str]:
    """The row's name, unique among all tables."""
    found: ColumnElement[str] = literal(table.name, Text)
    for part in table.primary_key:
        found = found.concat(" ").concat(cast(part, Text))
    return found


@lru_cache(maxsize=256)
def _read_statement(shape: Shape) -> Statement:
    parts: list[Any] = []
    for name, columns in shape:
        of = tables.metadata.tables[name]
        cells = type_coerce(func.row(*of.columns), Text)
        parts.append(select(literal(name, Text), _row(of), _version(of), cells).where(_where(of, columns)))
    return statement(union_all(*parts))


@lru_cache(maxsize=256)
def _check_statement(shape: Shape, *, is_locking: bool) -> Statement:
    """Divides by zero if the rows found are not those expected."""
    parts: list[Any] = []
    for name, columns in shape:
        of = tables.metadata.tables[name]
        found = select(_row(of).label("row"), _version(of).label("version")).where(_where(of, columns))
        if is_locking and of is tables.machines:
            found = found.order_by(of.c.id).with_for_update()
        part = found.subquery()
        parts.append(select(part.c.row, part.c.version))
    rows = union_all(*parts).subquery()
    none = cast(literal("{}", Text), JSONB)
    found_now = func.coalesce(cast(func.jsonb_object_agg(rows.c.row, rows.c.version), JSONB), none)
    is_same = found_now == cast(bindparam("expected", type_=Text), JSONB)
    return statement(select(literal(1, Integer).op("/")(cast(is_same, Integer))))


async def read(driver: Driver, sought: Sought) -> tuple[dict[str, list[Any]], dict[int, Version]]:
    """The rows of each table, and the version of each row by its `id()`."""
    query = _read_statement(_shape(sought))
    cursor = await driver.execute(query.text, query.values(_given(sought)), binary=True)
    rows: dict[str, list[Any]] = {}
    versions: dict[int, Version] = {}
    for name, row, version, cells in await cursor.fetchall():
        found = READERS[name](dict(zip(names(tables.metadata.tables[name]), cells, strict=True)))
        rows.setdefault(name, []).append(found)
        versions[id(found)] = row, version
    return rows, versions


def check(sought: Sought, expected: Mapping[str, str], *, is_locking: bool) -> Step:
    """Fails if the rows found are not those that were read. `is_locking` locks machines' rows until the transaction ends."""
    return _check_statement(_shape(sought), is_locking=is_locking), [{**_given(sought), "expected": json.dumps(expected)}]


# --- writes


def _of_any(of: Table, column: str = "id") -> ColumnElement[bool]:
    return of.c[column] == func.any(bindparam("ids", type_=ARRAY(Text)))


def _insert(of: Table) -> Insert:
    return insert(of).values({name: bindparam(name, type_=of.c[name].type) for name in names(of) if name != "seq"})


def _upsert(of: Table) -> Statement:
    made = insert_or(of)
    return statement(made.on_conflict_do_update(index_elements=list(of.primary_key), set_=dict(made.excluded.items())))


_CHANGES = table("changes", column("kind", Text), column("id", Text), column("body", Text))
_INSERT_CHANGE = statement(insert(_CHANGES))
_INSERT_MACHINE, _INSERT_CLAIM, _INSERT_TOKEN, _INSERT_PRINCIPAL, _INSERT_HISTORY = (
    statement(_insert(of)) for of in (tables.machines, tables.claims, tables.join_tokens, tables.principals, tables.history)
)
_DELETE_MACHINES, _DELETE_CLAIMS, _DELETE_TOKENS, _DELETE_PRINCIPALS = (
    statement(delete(of).where(_of_any(of))) for of in (tables.machines, tables.claims, tables.join_tokens, tables.principals)
)
_DELETE_USES = statement(delete(tables.token_uses).where(_of_any(tables.token_uses, "token_id")))
_MACHINE_VALUES: dict[str, Any] = {
    column.name: bindparam(f"new_{column.name}") for column in tables.machines.columns if column.name != "id"
}
_UPDATE_MACHINE = statement(update(tables.machines).where(tables.machines.c.id == bindparam("row")).values(_MACHINE_VALUES))
# the overlay address is never null, and no real address has 32 bytes
_FREE_MACHINES = statement(
    update(tables.machines)
    .where(_of_any(tables.machines))
    .values(
        public_key=null(),
        virtual_address=null(),
        name=null(),
        admission=MachineAdmission.PENDING.value,
        overlay_address=func.sha256(func.convert_to(tables.machines.c.id, "UTF8")),
    )
)
_INSERT_BAN = statement(insert_or(tables.bans).on_conflict_do_nothing())
_DELETE_BAN = statement(
    delete(tables.bans).where(tables.bans.c.kind == bindparam("kind"), tables.bans.c.value == bindparam("value"))
)
_RELEASE_USE, _TAKE_SLOT = statement(tables.release_use()), statement(tables.take_slot())
_MADE_USE = insert_or(tables.token_uses).on_conflict_do_nothing().returning(tables.token_uses.c.slot).cte("made")
_INSERT_USE = statement(select(literal(1, Integer).op("/")(func.count())).select_from(_MADE_USE))
"""Divides by zero if the slot is taken."""
_DELETE_SESSIONS = statement(delete(tables.sessions).where(_of_any(tables.sessions, "machine_id")))
_DELETE_FLEET_SERVERS = statement(delete(tables.servers).where(_of_any(tables.servers)))
_UPSERT_SESSION, _UPSERT_FLEET_SERVER, _UPSERT_SERVER = (_upsert(of) for of in (tables.sessions, tables.servers, tables.server))
_MADE_AUDIT = _insert(tables.audit).returning(tables.audit.c.seq).cte("made")
_AUDIT_BODY = cast(bindparam("body", type_=Text), JSONB).concat(func.jsonb_build_object("seq", _MADE_AUDIT.c.seq))
_INSERT_AUDIT = statement(
    insert(_CHANGES).from_select(
        ["kind", "id", "body"],
        select(literal("audit", Text), cast(_MADE_AUDIT.c.seq, Text), cast(_AUDIT_BODY, Text)),
    )
)
"""Also writes its change, which contains the number assigned by the database."""
_NOTE = statement(tables.note())


def writes(transaction: SqlTransaction) -> Iterator[Step]:
    """The transaction's changes, ordered so that no unique value exists twice in between; then the feed's changes."""
    yield from _write_machines(transaction)
    yield from _replace(transaction.claimed, tables.claims, _DELETE_CLAIMS, _INSERT_CLAIM)
    for ban, grounds in transaction.bans.items():
        if grounds is None:
            yield _DELETE_BAN, [{"kind": ban.kind.value, "value": ban.value}]
        else:
            yield _INSERT_BAN, [tables.ban_values(ban, grounds)]
    yield from _write_tokens(transaction.tokens)
    yield from _replace(transaction.named, tables.principals, _DELETE_PRINCIPALS, _INSERT_PRINCIPAL)
    yield from _write_ownership(transaction.ownership)
    if transaction.record is not None:
        yield _UPSERT_SERVER, [tables.server_values(transaction.record)]
    yield _NOTE, tables.note_values(transaction.seen, transaction.noted_at)
    yield _INSERT_HISTORY, history.values(transaction.happened)
    changes = [encode_change(change) for change in transaction.changes]
    yield _INSERT_CHANGE, [{"kind": kind, "id": name, "body": body} for kind, name, body in changes]
    audited = (audit.values(entry) for entry in transaction.audited)
    yield _INSERT_AUDIT, [values | {"body": json.dumps(values)} for values in audited]


def _write_machines(transaction: SqlTransaction) -> Iterator[Step]:
    rows, stored = transaction.rows, transaction.stored
    gone = [machine_id for machine_id, row in rows.items() if row is None and machine_id in stored]
    new = [cells_of(row, tables.machines) for row in rows.values() if row is not None and row.id not in stored]
    changed = [cells_of(row, tables.machines) for row in rows.values() if row is not None and row.id in stored]
    if gone:
        yield _DELETE_MACHINES, [{"ids": gone}]
    if changed and len(rows) > 1:
        # Free all values first, then insert: no two rows may have the same value in between.
        yield _FREE_MACHINES, [{"ids": [cells["id"] for cells in changed]}]
    yield _UPDATE_MACHINE, [{"row": row["id"]} | {f"new_{name}": value for name, value in row.items()} for row in changed]
    yield _INSERT_MACHINE, new


def _replace(rows: Mapping[str, Any], of: Table, remove: Statement, add: Statement) -> Iterator[Step]:
    """Write rows by id; None deletes the row."""
    if rows:
        yield remove, [{"ids": list(rows)}]
        yield add, [cells_of(row, of) for row in rows.values() if row is not None]


def _write_ownership(changed: SqlOwnership) -> Iterator[Step]:
    gone = [machine_id for machine_id, owner in changed.owners.items() if owner is None]
    if gone:
        yield _DELETE_SESSIONS, [{"ids": gone}]
    owners = (owner for owner in changed.owners.values() if owner is not None)
    yield _UPSERT_SESSION, [cells_of(owner, tables.sessions) for owner in owners]
    for server_id, server in changed.put_servers.items():
        if server is None:
            yield _DELETE_FLEET_SERVERS, [{"ids": [server_id]}]
        else:
            yield _UPSERT_FLEET_SERVER, [tables.fleet_server_values(server)]


def _write_tokens(changed: SqlTokens) -> Iterator[Step]:
    gone = [token_id for token_id, token in changed.tokens.items() if token is None]
    yield from _replace(changed.tokens, tables.join_tokens, _DELETE_TOKENS, _INSERT_TOKEN)
    if gone:
        yield _DELETE_USES, [{"ids": gone}]
    yield _RELEASE_USE, tables.released_uses(changed.released)
    yield _TAKE_SLOT, tables.taken_slots(changed.put_uses.values())
    yield _INSERT_USE, [cells_of(use, tables.token_uses) for use in changed.put_uses.values()]
