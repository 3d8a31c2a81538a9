"""Statements that are compiled once from the tables and run directly on a database's driver.

Each is one call of the driver: executing through SQLAlchemy costs several times as much on a busy event loop.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from sqlalchemy import Column, Table, and_, or_, true
from sqlalchemy.engine import Dialect
from sqlalchemy.sql import ClauseElement, ColumnElement

from siderolink.server.store.rows import MachineAdmission
from siderolink.server.store.sql import audit, tables
from siderolink.server.store.tokens import TokenUse

READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    tables.machines.name: tables.read_machine,
    tables.claims.name: tables.read_claim,
    tables.bans.name: lambda row: tables.read_ban(row["kind"], row["value"]),
    tables.join_tokens.name: tables.read_token,
    tables.token_uses.name: lambda row: TokenUse(**row),
    tables.principals.name: audit.read_principal,
    tables.sessions.name: tables.read_ownership,
    tables.servers.name: tables.read_fleet_server,
    tables.server.name: tables.read_server,
}
"""The function that parses a row, by table. They raise StoreError for an invalid row."""


class Statement:
    """A statement's text for one dialect, and the order of its parameters."""

    def __init__(self, clause: ClauseElement, dialect: Dialect) -> None:
        """The dialect's parameters must be positional."""
        compiled = clause.compile(dialect=dialect)
        self.text = str(compiled)
        self._order: list[str] = list(getattr(compiled, "positiontup", None) or ())
        self._fixed = {name: value for name, value in compiled.params.items() if value is not None}

    def values(self, given: Mapping[str, Any]) -> list[Any]:
        """Parameters by name, in order."""
        found = {**self._fixed, **given} if self._fixed else given
        return [*map(found.__getitem__, self._order)]


def matches(
    table: Table, columns: Collection[str], is_sought: Callable[[Column[Any]], ColumnElement[bool]]
) -> ColumnElement[bool]:
    """The condition for the rows that a `Sought` selects: those with a sought value in any of the columns; or all.

    A UUID selects the accepted machine only; a ban is matched by all its columns.
    """
    if not columns:
        return true()
    if table is tables.bans:
        return and_(*(is_sought(table.c[name]) for name in columns))
    found = [is_sought(table.c[name]) for name in columns if (table.name, name) != ("machines", "node_uuid")]
    if table is tables.machines and "node_uuid" in columns:
        found.append(and_(is_sought(table.c.node_uuid), table.c.admission == MachineAdmission.ACCEPTED.value))
    return or_(*found)
