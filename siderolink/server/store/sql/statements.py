"""The statements of joins, made once from the tables and run on SQLite's driver itself.

Each is one visit to the driver's thread, which costs a busy event loop more than the statement: SQLAlchemy's way takes four.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import aiosqlite
from sqlalchemy import Table, and_, bindparam, delete, insert, or_, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql import ClauseElement, ColumnElement

from siderolink.server.store.audit import AuditEntry, Principal
from siderolink.server.store.base import Ban, BanGrounds, Claim, LastSeen, Machine, MachineAdmission, ServerRecord
from siderolink.server.store.history import HistoryEntry
from siderolink.server.store.sql import audit, history, tables
from siderolink.server.store.sql.reading import Wanted
from siderolink.server.store.sql.token_rows import SqlTokens
from siderolink.server.store.tokens import JoinToken, TokenUse

Row = Sequence[Any]


class Statement:
    """A statement's text, and the order in which it takes its parameters."""

    def __init__(self, clause: ClauseElement) -> None:
        compiled = clause.compile(dialect=sqlite.dialect())
        self.text = str(compiled)
        self._order: list[str] = list(getattr(compiled, "positiontup", None) or ())
        self._fixed = {name: value for name, value in compiled.params.items() if value is not None}

    def values(self, given: Mapping[str, Any]) -> list[Any]:
        """Parameters by name, in order."""
        return [given[name] if name in given else self._fixed[name] for name in self._order]

    async def many(self, driver: aiosqlite.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            await driver.executemany(self.text, [self.values(row) for row in rows])


def _names(table: Table) -> list[str]:
    return [column.name for column in table.columns]


_INSERT_MACHINE, _INSERT_CLAIM, _INSERT_BAN, _INSERT_SERVER, _INSERT_PRINCIPAL, _INSERT_AUDIT = (
    Statement(insert(table))
    for table in (tables.machines, tables.claims, tables.bans, tables.server, tables.principals, tables.audit)
)
_DELETE_MACHINE = Statement(delete(tables.machines).where(tables.machines.c.id == bindparam("machine")))
_DELETE_CLAIM = Statement(delete(tables.claims).where(tables.claims.c.id == bindparam("claim")))
_DELETE_BAN = Statement(
    delete(tables.bans).where(tables.bans.c.kind == bindparam("kind"), tables.bans.c.value == bindparam("value"))
)
_INSERT_TOKEN, _INSERT_USE = Statement(insert(tables.join_tokens)), Statement(insert(tables.token_uses))
_DELETE_TOKEN = Statement(delete(tables.join_tokens).where(tables.join_tokens.c.id == bindparam("token")))
_DELETE_USES = Statement(delete(tables.token_uses).where(tables.token_uses.c.token_id == bindparam("token")))
_RELEASE_USE, _TAKE_SLOT = Statement(tables.release_use()), Statement(tables.take_slot())
_DELETE_PRINCIPAL = Statement(delete(tables.principals).where(tables.principals.c.id == bindparam("principal")))
_SELECT_PRINCIPALS = Statement(select(tables.principals))
_LAST_AUDIT = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'audit'"
_DELETE_SERVER = Statement(delete(tables.server))
_SELECT_SERVER = Statement(select(tables.server))

_NOTE = Statement(tables.note())
_INSERT_HISTORY = Statement(
    insert(tables.history).values({name: bindparam(name) for name in _names(tables.history) if name != "seq"})
)


@lru_cache(maxsize=256)
def _select(table: Table, shape: tuple[tuple[str, int], ...]) -> Statement:
    """The rows with any of the given values in one of the named columns. For a UUID, only the accepted machine."""
    matches: list[ColumnElement[bool]] = []
    for name, count in shape:
        match: ColumnElement[bool] = table.c[name].in_([bindparam(f"{name}_{number}") for number in range(count)])
        if table is tables.machines and name == "node_uuid":
            match = and_(match, table.c.admission == MachineAdmission.ACCEPTED.value)
        matches.append(match)
    return Statement(select(table).where(or_(*matches)))


async def _find(driver: aiosqlite.Connection, table: Table, wanted: Mapping[str, list[Hashable]]) -> list[Mapping[str, Any]]:
    padded = {name: _padded(values) for name, values in wanted.items()}
    statement = _select(table, tuple((name, len(values)) for name, values in padded.items()))
    given = {f"{name}_{at}": tables.cell(value) for name, values in padded.items() for at, value in enumerate(values)}
    names = _names(table)
    rows = await driver.execute_fetchall(statement.text, statement.values(given))
    return [dict(zip(names, row, strict=True)) for row in rows]


@lru_cache(maxsize=32)
def _select_bans(count: int) -> Statement:
    columns = tables.bans.c
    matches = (
        and_(columns.kind == bindparam(f"kind_{number}"), columns.value == bindparam(f"value_{number}"))
        for number in range(count)
    )
    return Statement(select(columns.kind, columns.value).where(or_(*matches)))


class SqliteFinder:
    """See `Finder`."""

    def __init__(self, driver: aiosqlite.Connection) -> None:
        self._driver = driver

    async def machines(self, wanted: Wanted) -> list[Machine]:
        return [tables.read_machine(row) for row in await _find(self._driver, tables.machines, wanted)]

    async def claims(self, wanted: Wanted) -> list[Claim]:
        return [tables.read_claim(row) for row in await _find(self._driver, tables.claims, wanted)]

    async def bans(self, wanted: list[Hashable]) -> list[Ban]:
        padded = [ban for ban in _padded(wanted) if isinstance(ban, Ban)]
        statement = _select_bans(len(padded))
        given = {f"kind_{at}": ban.kind.value for at, ban in enumerate(padded)}
        given |= {f"value_{at}": ban.value for at, ban in enumerate(padded)}
        rows = await self._driver.execute_fetchall(statement.text, statement.values(given))
        return [tables.read_ban(kind, value) for kind, value in rows]

    async def tokens(self, wanted: Wanted) -> list[JoinToken]:
        return [tables.read_token(row) for row in await _find(self._driver, tables.join_tokens, wanted)]

    async def uses(self, token_ids: list[Hashable]) -> list[TokenUse]:
        return [TokenUse(**row) for row in await _find(self._driver, tables.token_uses, {"token_id": token_ids})]

    async def principals(self) -> list[Principal]:
        rows = await self._driver.execute_fetchall(_SELECT_PRINCIPALS.text)
        names = _names(tables.principals)
        return [tables.read_principal(dict(zip(names, row, strict=True))) for row in rows]

    async def server(self) -> ServerRecord | None:
        rows = list(await self._driver.execute_fetchall(_SELECT_SERVER.text))
        return tables.read_server(dict(zip(_names(tables.server), rows[0], strict=True))) if rows else None


async def replace_machines(driver: aiosqlite.Connection, old: Iterable[str], new: Iterable[Machine]) -> None:
    """All out first, then in: on the way no two rows may hold the same value."""
    await _DELETE_MACHINE.many(driver, [{"machine": machine_id} for machine_id in old])
    await _INSERT_MACHINE.many(driver, [tables.cells(machine, tables.machines) for machine in new])


async def replace_claims(driver: aiosqlite.Connection, claims: Mapping[str, Claim | None]) -> None:
    """New values of claims by id; None deletes the claim."""
    await _DELETE_CLAIM.many(driver, [{"claim": claim_id} for claim_id in claims])
    await _INSERT_CLAIM.many(driver, [tables.cells(claim, tables.claims) for claim in claims.values() if claim is not None])


async def set_bans(driver: aiosqlite.Connection, bans: Mapping[Ban, BanGrounds | None]) -> None:
    """Bans that are made; None lifts the ban."""
    await _DELETE_BAN.many(driver, [{"kind": ban.kind.value, "value": ban.value} for ban in bans])
    made = [tables.ban_values(ban, grounds) for ban, grounds in bans.items() if grounds is not None]
    await _INSERT_BAN.many(driver, made)


async def set_principals(driver: aiosqlite.Connection, principals: Mapping[str, Principal | None]) -> None:
    """New values of principals by id; None deletes the principal."""
    await _DELETE_PRINCIPAL.many(driver, [{"principal": principal_id} for principal_id in principals])
    rows = [tables.cells(one, tables.principals) for one in principals.values() if one is not None]
    await _INSERT_PRINCIPAL.many(driver, rows)


async def last_audit(driver: aiosqlite.Connection) -> int:
    """The highest number that an audit entry ever had."""
    (found,) = await driver.execute_fetchall(_LAST_AUDIT)
    return int(found[0])


async def add_audit(driver: aiosqlite.Connection, entries: Sequence[AuditEntry]) -> None:
    """Add numbered entries."""
    await _INSERT_AUDIT.many(driver, [{"seq": entry.seq} | audit.values(entry) for entry in entries])


async def set_tokens(driver: aiosqlite.Connection, changed: SqlTokens) -> None:
    await _DELETE_TOKEN.many(driver, [{"token": token_id} for token_id in changed.tokens])
    await _DELETE_USES.many(driver, [{"token": token_id} for token_id, token in changed.tokens.items() if token is None])
    new = [tables.cells(token, tables.join_tokens) for token in changed.tokens.values() if token is not None]
    await _INSERT_TOKEN.many(driver, new)
    await _RELEASE_USE.many(driver, tables.released_uses(changed.released))
    await _TAKE_SLOT.many(driver, tables.taken_slots(changed.put_uses.values()))
    await _INSERT_USE.many(driver, [tables.cells(use, tables.token_uses) for use in changed.put_uses.values()])


async def set_server(driver: aiosqlite.Connection, record: ServerRecord) -> None:
    await _DELETE_SERVER.many(driver, [{}])
    await _INSERT_SERVER.many(driver, [tables.server_values(record)])


async def note(driver: aiosqlite.Connection, seen: Mapping[str, LastSeen]) -> None:
    await _NOTE.many(driver, tables.note_values(seen))


async def add_history(driver: aiosqlite.Connection, entries: Sequence[HistoryEntry]) -> None:
    await _INSERT_HISTORY.many(driver, history.values(entries))


def _padded(values: list[Hashable]) -> list[Hashable]:
    """As many values as a power of two, so that few different statements have to be prepared."""
    return values + values[-1:] * ((1 << (len(values) - 1).bit_length()) - len(values))
