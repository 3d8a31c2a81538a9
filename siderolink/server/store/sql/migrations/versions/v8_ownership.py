"""The servers that share the store, and the owners of machines' links."""

import sqlalchemy as sa
from alembic import op

revision = "8"
down_revision = "7"


def upgrade() -> None:
    op.create_table(
        "sessions",
        sa.Column("machine_id", sa.Text, primary_key=True),
        sa.Column("server_id", sa.Text, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("public_key", sa.LargeBinary, nullable=False),
        sa.Column("endpoint", sa.Text),
        sa.Column("heard_at", sa.Float, nullable=False),
        sa.Column("handshake_at", sa.Float),
        sa.Column("stamp", sa.LargeBinary, nullable=False),
        sa.Column("rx", sa.BigInteger, nullable=False),
        sa.Column("tx", sa.BigInteger, nullable=False),
    )
    op.create_index("sessions_of_servers", "sessions", ["server_id"])
    op.create_table(
        "servers",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("endpoints", sa.Text, nullable=False),
        sa.Column("peer_address", sa.Text, nullable=False),
        sa.Column("peer_fingerprint", sa.Text, nullable=False),
        sa.Column("heartbeat_at", sa.Float, nullable=False),
        sa.Column("software", sa.Text, nullable=False),
        sa.Column("schema", sa.Integer, nullable=False),
        sa.Column("clock_offset", sa.Float, nullable=False),
        sa.Column("is_draining", sa.Boolean, nullable=False),
    )
