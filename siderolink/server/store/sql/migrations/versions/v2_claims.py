"""Claims, pending machines, and bans by more than the UUID."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    _machines()
    op.create_table(
        "claims",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("machine_id", sa.Text, nullable=False),
        sa.Column("public_key", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("virtual_address", sa.LargeBinary, unique=True),
        sa.Column("unique_token_digest", sa.LargeBinary),
        sa.Column("unique_fingerprint", sa.Text, nullable=False),
        sa.Column("join_token_digest", sa.LargeBinary),
        sa.Column("talos_version", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("basis", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_index("claimed_machines", "claims", ["machine_id"])
    bans = op.create_table(
        "new_bans", sa.Column("kind", sa.Text, primary_key=True), sa.Column("value", sa.Text, primary_key=True)
    )
    old = sa.table("bans", sa.column("node_uuid"))
    op.execute(sa.insert(bans).from_select(["kind", "value"], sa.select(sa.literal("uuid"), old.c.node_uuid)))
    op.drop_table("bans")
    op.rename_table("new_bans", "bans")


def _machines() -> None:
    """Copies the rows to a new table: UUIDs are unique among accepted machines only, and SQLite cannot drop a constraint."""
    kept: list[sa.Column[Any]] = [
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("node_uuid", sa.Text, nullable=False),
        sa.Column("public_key", sa.LargeBinary, unique=True),
        sa.Column("overlay_address", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("virtual_address", sa.LargeBinary, unique=True),
        sa.Column("virtual_issued_at", sa.Float),
        sa.Column("unique_token_digest", sa.LargeBinary),
        sa.Column("talos_version", sa.Text, nullable=False),
        sa.Column("tunnel", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("joined_at", sa.Float, nullable=False),
        sa.Column("linked_at", sa.Float),
        sa.Column("was_linked", sa.Boolean, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("last_endpoint", sa.Text),
        sa.Column("last_handshake_at", sa.Float),
        sa.Column("seen_at", sa.Float),
    ]
    names = [column.name for column in kept]
    new = op.create_table(
        "new_machines",
        *kept,
        sa.Column("unique_fingerprint", sa.Text, nullable=False),
        sa.Column("admission", sa.Text, nullable=False),
        sa.Column("has_uuid_conflict", sa.Boolean, nullable=False),
        sa.Column("is_installed", sa.Boolean, nullable=False),
        sa.Column("assigned_uuid", sa.Text),
        sa.Column("assigned_token", sa.Text),
        sa.Column("join_token_digest", sa.LargeBinary),
        sa.Column("last_source", sa.Text),
        sa.Column("goodbye_at", sa.Float),
    )
    old = sa.table("machines", *(sa.column(name) for name in names))
    added = {"unique_fingerprint": "", "admission": "accepted", "has_uuid_conflict": False, "is_installed": False}
    values = (sa.literal(value) for value in added.values())
    op.execute(sa.insert(new).from_select([*names, *added], sa.select(*old.c, *values)))
    op.drop_table("machines")
    op.rename_table("new_machines", "machines")
    accepted = sa.text("admission = 'accepted'")
    op.create_index("accepted_uuids", "machines", ["node_uuid"], unique=True, sqlite_where=accepted, postgresql_where=accepted)
    op.create_index("uuids", "machines", ["node_uuid"])
