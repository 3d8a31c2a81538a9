"""The statements of joins, made once from the tables and run on SQLite's driver itself.

Each is one visit to the driver's thread, which costs a busy event loop more than the statement: SQLAlchemy's way takes four.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import aiosqlite
from sqlalchemy import bindparam, delete, insert, select, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.sql import ClauseElement

from siderolink.server.store.base import Machine, ServerRecord, Sighting
from siderolink.server.store.sql import tables

Row = Sequence[Any]


def _text(statement: ClauseElement) -> str:
    return str(statement.compile(dialect=sqlite.dialect()))


_NAMES = [column.name for column in tables.machines.columns]
_SELECT = _text(select(tables.machines))
_INSERT = _text(insert(tables.machines))
_DELETE = _text(delete(tables.machines).where(tables.machines.c.id == bindparam("machine")))
_SELECT_BANS = _text(select(tables.bans.c.node_uuid))
_INSERT_BAN = _text(insert(tables.bans))
_DELETE_BAN = _text(delete(tables.bans).where(tables.bans.c.node_uuid == bindparam("uuid")))
_SELECT_SERVER = _text(select(tables.server))
_INSERT_SERVER = _text(insert(tables.server))
_DELETE_SERVER = _text(delete(tables.server))
_NOTE = _text(
    update(tables.machines)
    .values(last_endpoint=bindparam("endpoint"), last_handshake_at=bindparam("handshake"), seen_at=bindparam("at"))
    .where(tables.machines.c.id == bindparam("machine"))
).replace("last_handshake_at=?", "last_handshake_at=coalesce(?, last_handshake_at)")


async def find_machines(driver: aiosqlite.Connection, wanted: dict[str, list[Hashable]]) -> list[Machine]:
    """All machines that have one of the wanted values in the column that it is wanted in."""
    asked = [(name, wanted[name]) for name in _NAMES if name in wanted]
    values = [tables.cell(value) for _, values in asked for value in _padded(values)]
    matches = " OR ".join(f"machines.{name} IN ({_marks(values)})" for name, values in asked)
    return [_machine(row) for row in await driver.execute_fetchall(f"{_SELECT} WHERE {matches}", values)]


async def find_bans(driver: aiosqlite.Connection, wanted: list[Hashable]) -> list[str]:
    found = await driver.execute_fetchall(f"{_SELECT_BANS} WHERE bans.node_uuid IN ({_marks(wanted)})", _padded(wanted))
    return [str(node_uuid) for (node_uuid,) in found]


async def find_server(driver: aiosqlite.Connection) -> ServerRecord | None:
    rows = list(await driver.execute_fetchall(_SELECT_SERVER))
    return tables.read_server(dict(zip(tables.server.columns.keys(), rows[0], strict=True))) if rows else None


async def replace_machines(driver: aiosqlite.Connection, old: Iterable[str], new: Iterable[Machine]) -> None:
    """All out first, then in: on the way no two rows may hold the same value."""
    await _many(driver, _DELETE, [(machine_id,) for machine_id in old])
    await _many(driver, _INSERT, [[tables.cell(getattr(machine, name)) for name in _NAMES] for machine in new])


async def set_bans(driver: aiosqlite.Connection, bans: dict[str, bool]) -> None:
    await _many(driver, _DELETE_BAN, [(node_uuid,) for node_uuid in bans])
    await _many(driver, _INSERT_BAN, [(node_uuid,) for node_uuid, banned in bans.items() if banned])


async def set_server(driver: aiosqlite.Connection, record: ServerRecord) -> None:
    await _many(driver, _DELETE_SERVER, [()])
    await _many(driver, _INSERT_SERVER, [list(tables.server_values(record).values())])


async def note(driver: aiosqlite.Connection, sightings: dict[str, Sighting]) -> None:
    rows = [(seen.endpoint, seen.handshake_at, seen.seen_at, machine_id) for machine_id, seen in sightings.items()]
    await _many(driver, _NOTE, rows)


async def _many(driver: aiosqlite.Connection, statement: str, rows: Sequence[Row]) -> None:
    if rows:
        await driver.executemany(statement, rows)


def _machine(row: Row) -> Machine:
    return tables.read_machine(dict(zip(_NAMES, row, strict=True)))


def _padded(values: list[Hashable]) -> list[Hashable]:
    """As many values as a power of two, so that few different statements have to be prepared."""
    return values + values[-1:] * ((1 << (len(values) - 1).bit_length()) - len(values))


def _marks(values: list[Hashable]) -> str:
    return ", ".join("?" * len(_padded(values)))
