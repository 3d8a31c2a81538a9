"""The oldest programs that may use a newer schema: on Postgres, servers are replaced one by one."""

import sqlalchemy as sa
from alembic import op

revision = "7"
down_revision = "6"


def upgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.add_column("feed", sa.Column("usable_since", sa.Integer, nullable=False, server_default="0"))
