"""Machines' names, labels, notes and tunnel settings; grounds of bans; principals; the audit."""

import sqlalchemy as sa
from alembic import op

revision = "6"
down_revision = "5"


def upgrade() -> None:
    # defaults for servers of the previous release, which do not write these columns
    op.add_column("machines", sa.Column("name", sa.Text))
    op.add_column("machines", sa.Column("labels", sa.Text, nullable=False, server_default="{}"))
    op.add_column("machines", sa.Column("note", sa.Text, nullable=False, server_default=""))
    op.add_column("machines", sa.Column("tunnel_setting", sa.Text, nullable=False, server_default="inherit"))
    op.create_index("machine_names", "machines", ["name"], unique=True)
    op.add_column("bans", sa.Column("reason", sa.Text, nullable=False, server_default=""))
    op.add_column("bans", sa.Column("created_by", sa.Text, nullable=False, server_default=""))
    op.add_column("bans", sa.Column("created_at", sa.Float))
    op.create_table(
        "principals",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("key_digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("revoked_at", sa.Float),
        sa.Column("last_used_at", sa.Float),
        sa.Column("last_source", sa.Text, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("object_kind", sa.Text, nullable=False),
        sa.Column("object_id", sa.Text, nullable=False),
        sa.Column("object_name", sa.Text, nullable=False),
        sa.Column("before", sa.Text, nullable=False),
        sa.Column("after", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("audit_times", "audit", ["at"])
