"""How fast single machines may send and be sent to; which machines' ports API keys may forward to."""

import sqlalchemy as sa
from alembic import op

revision = "9"
down_revision = "8"


def upgrade() -> None:
    # the default is for servers of the release before, which do not know the column
    op.add_column("machines", sa.Column("rate_rx", sa.BigInteger))
    op.add_column("machines", sa.Column("rate_tx", sa.BigInteger))
    op.add_column("principals", sa.Column("grants", sa.Text, nullable=False, server_default="[]"))
