"""The statements of joins, run directly on SQLite's driver."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import aiosqlite
from sqlalchemy import Column, bindparam, delete, insert, literal_column, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql import ClauseElement, ColumnElement

from siderolink.server.store.audit import AuditEntry, Principal
from siderolink.server.store.history import HistoryEntry
from siderolink.server.store.rows import Ban, BanGrounds, Claim, LastSeen, Machine, ServerRecord
from siderolink.server.store.sql import audit, history, tables
from siderolink.server.store.sql.batch_reads import Sought
from siderolink.server.store.sql.cells import cell, cells_of, names
from siderolink.server.store.sql.ownership_rows import SqlOwnership
from siderolink.server.store.sql.queries import READERS, Statement, matches
from siderolink.server.store.sql.token_rows import SqlTokens

_DIALECT = sqlite.dialect()

_WIDTH = max(len(names(tables.metadata.tables[name])) for name in READERS)


def _statement(clause: ClauseElement) -> Statement:
    return Statement(clause, _DIALECT)


async def _run(driver: aiosqlite.Connection, statement: Statement, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        await driver.executemany(statement.text, [statement.values(row) for row in rows])


_INSERT_MACHINE, _INSERT_CLAIM, _INSERT_BAN, _INSERT_SERVER, _INSERT_PRINCIPAL, _INSERT_AUDIT = (
    _statement(insert(table))
    for table in (tables.machines, tables.claims, tables.bans, tables.server, tables.principals, tables.audit)
)
_DELETE_MACHINE = _statement(delete(tables.machines).where(tables.machines.c.id == bindparam("machine")))
_DELETE_CLAIM = _statement(delete(tables.claims).where(tables.claims.c.id == bindparam("claim")))
_DELETE_BAN = _statement(
    delete(tables.bans).where(tables.bans.c.kind == bindparam("kind"), tables.bans.c.value == bindparam("value"))
)
_INSERT_TOKEN, _INSERT_USE = _statement(insert(tables.join_tokens)), _statement(insert(tables.token_uses))
_DELETE_TOKEN = _statement(delete(tables.join_tokens).where(tables.join_tokens.c.id == bindparam("token")))
_DELETE_USES = _statement(delete(tables.token_uses).where(tables.token_uses.c.token_id == bindparam("token")))
_RELEASE_USE, _TAKE_SLOT = _statement(tables.release_use()), _statement(tables.take_slot())
_DELETE_PRINCIPAL = _statement(delete(tables.principals).where(tables.principals.c.id == bindparam("principal")))
_LAST_AUDIT = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'audit'"
_DELETE_SESSION = _statement(delete(tables.sessions).where(tables.sessions.c.machine_id == bindparam("machine")))
_DELETE_FLEET_SERVER = _statement(delete(tables.servers).where(tables.servers.c.id == bindparam("server")))
_INSERT_SESSION, _INSERT_FLEET_SERVER = _statement(insert(tables.sessions)), _statement(insert(tables.servers))
_DELETE_SERVER = _statement(delete(tables.server))

_NOTE = _statement(tables.note())
_INSERT_HISTORY = _statement(
    insert(tables.history).values({name: bindparam(name) for name in names(tables.history) if name != "seq"})
)


@lru_cache(maxsize=256)
def _numbered(column: str, count: int) -> list[str]:
    """The names of a column's parameters."""
    return [f"{column}_{at}" for at in range(count)]


@lru_cache(maxsize=256)
def _select(name: str, counts: tuple[tuple[str, int], ...]) -> Statement:
    """The name of a table, then its rows that have one of so many values per column, filled up to `_WIDTH` columns."""
    table, searched = tables.metadata.tables[name], dict(counts)

    def is_sought(column: Column[Any]) -> ColumnElement[bool]:
        return column.in_([bindparam(name) for name in _numbered(column.name, searched[column.name])])

    filling: list[ColumnElement[Any]] = [literal_column("NULL")] * (_WIDTH - len(names(table)))
    found = select(literal_column(f"'{name}'"), *table.columns, *filling)
    return _statement(found.where(matches(table, searched, is_sought)))


class SqliteFinder:
    """See `Finder`. All tables are read in one statement: a visit to the driver's thread costs more than a query."""

    def __init__(self, driver: aiosqlite.Connection) -> None:
        self._driver = driver

    async def rows(self, sought: Sought) -> Mapping[str, Sequence[Any]]:
        texts: list[str] = []
        given: list[object] = []
        for table, columns in sought.items():
            cells: dict[str, object] = {}
            counts: list[tuple[str, int]] = []
            for column, values in columns.items():
                padded = _padded(values)
                counts.append((column, len(padded)))
                cells.update(zip(_numbered(*counts[-1]), map(cell, padded), strict=True))
            part = _select(table, tuple(counts))
            texts.append(part.text)
            given += part.values(cells)
        found: dict[str, list[Any]] = {table: [] for table in sought}
        if texts:
            for table, *row in await self._driver.execute_fetchall(" UNION ALL ".join(texts), given):
                columns_of = names(tables.metadata.tables[table])
                found[table].append(READERS[table](dict(zip(columns_of, row, strict=False))))
        return found


async def replace_machines(driver: aiosqlite.Connection, old: Iterable[str], new: Iterable[Machine]) -> None:
    """Replace machine rows. Removes all first, then inserts: no two rows may have the same value in between."""
    await _run(driver, _DELETE_MACHINE, [{"machine": machine_id} for machine_id in old])
    await _run(driver, _INSERT_MACHINE, [cells_of(machine, tables.machines) for machine in new])


async def replace_claims(driver: aiosqlite.Connection, claims: Mapping[str, Claim | None]) -> None:
    """Write claims by id; None deletes the claim."""
    await _run(driver, _DELETE_CLAIM, [{"claim": claim_id} for claim_id in claims])
    await _run(driver, _INSERT_CLAIM, [cells_of(claim, tables.claims) for claim in claims.values() if claim is not None])


async def set_bans(driver: aiosqlite.Connection, bans: Mapping[Ban, BanGrounds | None]) -> None:
    """Make bans; None lifts the ban."""
    await _run(driver, _DELETE_BAN, [{"kind": ban.kind.value, "value": ban.value} for ban in bans])
    made = [tables.ban_values(ban, grounds) for ban, grounds in bans.items() if grounds is not None]
    await _run(driver, _INSERT_BAN, made)


async def set_principals(driver: aiosqlite.Connection, principals: Mapping[str, Principal | None]) -> None:
    """Write principals by id; None deletes the principal."""
    await _run(driver, _DELETE_PRINCIPAL, [{"principal": principal_id} for principal_id in principals])
    rows = [cells_of(one, tables.principals) for one in principals.values() if one is not None]
    await _run(driver, _INSERT_PRINCIPAL, rows)


async def last_audit(driver: aiosqlite.Connection) -> int:
    """The highest number ever given to an audit entry."""
    (found,) = await driver.execute_fetchall(_LAST_AUDIT)
    return int(found[0])


async def add_audit(driver: aiosqlite.Connection, entries: Sequence[AuditEntry]) -> None:
    """Add audit entries that are already numbered."""
    await _run(driver, _INSERT_AUDIT, [{"seq": entry.seq} | audit.values(entry) for entry in entries])


async def set_tokens(driver: aiosqlite.Connection, changed: SqlTokens) -> None:
    await _run(driver, _DELETE_TOKEN, [{"token": token_id} for token_id in changed.tokens])
    await _run(driver, _DELETE_USES, [{"token": token_id} for token_id, token in changed.tokens.items() if token is None])
    new = [cells_of(token, tables.join_tokens) for token in changed.tokens.values() if token is not None]
    await _run(driver, _INSERT_TOKEN, new)
    await _run(driver, _RELEASE_USE, tables.released_uses(changed.released))
    await _run(driver, _TAKE_SLOT, tables.taken_slots(changed.put_uses.values()))
    await _run(driver, _INSERT_USE, [cells_of(use, tables.token_uses) for use in changed.put_uses.values()])


async def set_ownership(driver: aiosqlite.Connection, changed: SqlOwnership) -> None:
    await _run(driver, _DELETE_SESSION, [{"machine": machine_id} for machine_id in changed.owners])
    owners = [cells_of(owner, tables.sessions) for owner in changed.owners.values() if owner is not None]
    await _run(driver, _INSERT_SESSION, owners)
    await _run(driver, _DELETE_FLEET_SERVER, [{"server": server_id} for server_id in changed.put_servers])
    servers = [tables.fleet_server_values(one) for one in changed.put_servers.values() if one is not None]
    await _run(driver, _INSERT_FLEET_SERVER, servers)


async def set_server(driver: aiosqlite.Connection, record: ServerRecord) -> None:
    await _run(driver, _DELETE_SERVER, [{}])
    await _run(driver, _INSERT_SERVER, [tables.server_values(record)])


async def note(driver: aiosqlite.Connection, seen: Mapping[str, LastSeen], now: float) -> None:
    await _run(driver, _NOTE, tables.note_values(seen, now))


async def add_history(driver: aiosqlite.Connection, entries: Sequence[HistoryEntry]) -> None:
    await _run(driver, _INSERT_HISTORY, history.values(entries))


def _padded(values: list[Hashable]) -> list[Hashable]:
    """Pad to a power of two values, so that only a few different statements are prepared."""
    return values + values[-1:] * ((1 << (len(values) - 1).bit_length()) - len(values))
