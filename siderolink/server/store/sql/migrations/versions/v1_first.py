"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "machines",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("node_uuid", sa.Text, nullable=False, unique=True),
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
    )
    op.create_table("bans", sa.Column("node_uuid", sa.Text, primary_key=True))
    op.create_table(
        "server",
        sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1"), primary_key=True),
        sa.Column("private_key", sa.LargeBinary, nullable=False),
        sa.Column("installation_id", sa.Text, nullable=False),
        sa.Column("timestamp_mark", sa.LargeBinary, nullable=False),
    )
