"""The tables, and how a machine's row is written in them."""

from collections.abc import Mapping
from ipaddress import IPv6Address
from typing import Any

from sqlalchemy import Boolean, CheckConstraint, Column, Float, Integer, LargeBinary, MetaData, Table, Text

from siderolink.common.errors import StoreError
from siderolink.common.keys import KEY_BYTES, PrivateKey, PublicKey
from siderolink.server.store.base import Machine, ServerRecord

HEAD = "1"
"""The newest migration, which these tables are."""

metadata = MetaData()

machines = Table(
    "machines",
    metadata,
    Column("id", Text, primary_key=True),
    Column("node_uuid", Text, nullable=False, unique=True),
    Column("public_key", LargeBinary, unique=True),
    Column("overlay_address", LargeBinary, nullable=False, unique=True),
    Column("virtual_address", LargeBinary, unique=True),
    Column("virtual_issued_at", Float),
    Column("unique_token_digest", LargeBinary),
    Column("talos_version", Text, nullable=False),
    Column("tunnel", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("joined_at", Float, nullable=False),
    Column("linked_at", Float),
    Column("was_linked", Boolean, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("last_endpoint", Text),
    Column("last_handshake_at", Float),
    Column("seen_at", Float),
)

bans = Table("bans", metadata, Column("node_uuid", Text, primary_key=True))

server = Table(
    "server",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1"), primary_key=True),
    Column("private_key", LargeBinary, nullable=False),
    Column("installation_id", Text, nullable=False),
    Column("timestamp_mark", LargeBinary, nullable=False),
)


def cell(value: object) -> object:
    """A field's value as its column holds it."""
    if isinstance(value, PublicKey):
        return bytes(value)
    if isinstance(value, IPv6Address):
        return value.packed
    return value


def read_machine(row: Mapping[Any, Any]) -> Machine:
    """Raises StoreError for a row that no server wrote."""
    fields = dict(row)
    key, virtual = fields.pop("public_key"), fields.pop("virtual_address")
    tunnel, was_linked = fields.pop("tunnel"), fields.pop("was_linked")
    try:
        return Machine(
            public_key=None if key is None else PublicKey(key),
            overlay_address=IPv6Address(fields.pop("overlay_address")),
            virtual_address=None if virtual is None else IPv6Address(virtual),
            tunnel=bool(tunnel),
            was_linked=bool(was_linked),
            **fields,
        )
    except (ValueError, TypeError):
        raise StoreError("the state holds a machine that no server wrote") from None


def server_values(record: ServerRecord) -> dict[str, object]:
    return {
        "id": 1,
        "private_key": bytes(record.private_key),
        "installation_id": record.installation_id,
        "timestamp_mark": record.timestamp_mark,
    }


def read_server(row: Mapping[Any, Any]) -> ServerRecord:
    """Raises StoreError for a row that no server wrote."""
    if len(row["timestamp_mark"]) != 12 or len(row["private_key"]) != KEY_BYTES:
        raise StoreError("the state holds a server's record that no server wrote")
    return ServerRecord(
        private_key=PrivateKey(row["private_key"]),
        installation_id=row["installation_id"],
        timestamp_mark=row["timestamp_mark"],
    )
