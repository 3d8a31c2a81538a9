"""A store with many rows, loaded as a bulk: machines, and in Postgres who owns their links."""

import random
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from ipaddress import IPv6Address
from typing import Any

import psycopg
from sqlalchemy import Table

from siderolink.common.keys import PublicKey
from siderolink.server.store import Machine
from siderolink.server.store.ownership import Ownership
from siderolink.server.store.sql import tables
from siderolink.server.store.sql.cells import cells_of


def machine_cells(number: int) -> dict[str, object]:
    random_bytes = random.Random(number).randbytes
    row = Machine(
        id=random_bytes(8).hex(),
        node_uuid=str(uuid.UUID(bytes=random_bytes(16))),
        public_key=PublicKey(random_bytes(32)),
        overlay_address=IPv6Address(random_bytes(16)),
        virtual_address=IPv6Address(random_bytes(16)),
        talos_version="v1.11.0",
        created_at=1.0,
        joined_at=1.0,
        linked_at=2.0,
        was_linked=True,
        last_endpoint="192.0.2.7:51820",
        last_handshake_at=3.0,
        seen_at=3.0,
        last_source="192.0.2.7",
    )
    return cells_of(row, tables.machines)


def _owner_cells(number: int, server_id: str) -> dict[str, object]:
    row = machine_cells(number)
    owner = Ownership(
        machine_id=str(row["id"]),
        server_id=server_id,
        epoch=1,
        public_key=PublicKey(row["public_key"]),  # type: ignore[arg-type]
        endpoint="192.0.2.7:51820",
        heard_at=3.0,
        handshake_at=3.0,
    )
    return cells_of(owner, tables.sessions)


def fill(where: str, count: int, owner: str = "another server") -> float:
    """Load rows in bulk, in Postgres with the owners of their links; returns the seconds it took."""
    began = time.perf_counter()
    if "://" in where:
        with psycopg.connect(where) as connection:
            _copy(connection, tables.machines, map(machine_cells, range(count)))
            _copy(connection, tables.sessions, (_owner_cells(number, owner) for number in range(count)))
            connection.commit()
            connection.autocommit = True
            connection.execute("VACUUM ANALYZE machines, sessions")
    else:
        names, rows = _columns(tables.machines, map(machine_cells, range(count)))
        with sqlite3.connect(where) as file:
            file.executemany(f"INSERT INTO machines ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", rows)
        file.close()
    return time.perf_counter() - began


def _columns(table: Table, cells: Iterable[dict[str, object]]) -> tuple[list[str], Iterator[list[object]]]:
    names = [column.name for column in table.columns]
    return names, ([_plain(one[name]) for name in names] for one in cells)


def _copy(connection: "psycopg.Connection[Any]", table: Table, cells: Iterable[dict[str, object]]) -> None:
    names, rows = _columns(table, cells)
    with connection.cursor() as cursor, cursor.copy(f"COPY {table.name} ({', '.join(names)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, str) else value


def tell_bytes(where: str, count: int) -> None:
    """Bytes of a row on disk, including indexes."""
    with psycopg.connect(where) as connection:
        for table in ("machines", "sessions"):
            found = connection.execute(f"SELECT pg_total_relation_size('{table}'), pg_indexes_size('{table}')").fetchone()
            assert found is not None
            print(f"  {found[0] / count:.0f} bytes a row of {table}, {found[1] / count:.0f} of them indexes")
