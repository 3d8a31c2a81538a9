"""The limit on known machines of a join token."""

import sqlalchemy as sa
from alembic import op

revision = "10"
down_revision = "9"


def upgrade() -> None:
    op.add_column("join_tokens", sa.Column("max_machines", sa.Integer))
