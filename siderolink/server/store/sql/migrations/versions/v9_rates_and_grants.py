"""Rate limits of single machines, and the machines' ports that API keys may forward to."""

import sqlalchemy as sa
from alembic import op

revision = "9"
down_revision = "8"


def upgrade() -> None:
    # default for servers of the previous release, which do not write the column
    op.add_column("machines", sa.Column("rate_rx", sa.BigInteger))
    op.add_column("machines", sa.Column("rate_tx", sa.BigInteger))
    op.add_column("principals", sa.Column("grants", sa.Text, nullable=False, server_default="[]"))
