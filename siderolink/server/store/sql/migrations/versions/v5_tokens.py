"""Join tokens, their uses, and the settings that machines get from them."""

import sqlalchemy as sa
from alembic import op

revision = "5"
down_revision = "4"


def upgrade() -> None:
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("secret", sa.LargeBinary, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("provider", sa.Text, unique=True),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("revoked_at", sa.Float),
        sa.Column("max_uses", sa.Integer),
        sa.Column("bound_uuid", sa.Text),
        sa.Column("tunnel", sa.Text, nullable=False),
        sa.Column("labels", sa.Text, nullable=False),
        sa.Column("is_default", sa.Boolean, nullable=False),
    )
    only = sa.text("is_default")
    op.create_index("default_token", "join_tokens", ["is_default"], unique=True, sqlite_where=only, postgresql_where=only)
    op.create_table(
        "token_uses",
        sa.Column("token_id", sa.Text, primary_key=True),
        sa.Column("slot", sa.Integer, primary_key=True),
        sa.Column("machine_id", sa.Text, nullable=False),
        sa.Column("reserved_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float),
        sa.Column("spent_at", sa.Float),
    )
    op.add_column("claims", sa.Column("labels", sa.Text, nullable=False, server_default="{}"))
    op.add_column("machines", sa.Column("assigned_digest", sa.LargeBinary))
    op.create_index("token_users", "token_uses", ["token_id", "machine_id"], unique=True)
    for table in ("machines", "claims"):
        op.add_column(table, sa.Column("token_id", sa.Text))
        op.add_column(table, sa.Column("has_reserved_use", sa.Boolean, nullable=False, server_default=sa.false()))
