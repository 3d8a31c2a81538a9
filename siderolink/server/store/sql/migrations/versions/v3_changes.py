"""The feed of changes on Postgres. A SQLite file is used by one server, which publishes its changes itself."""

from alembic import op

revision = "3"
down_revision = "2"


def upgrade() -> None:
    if op.get_context().dialect.name != "postgresql":
        return
    op.execute(
        "CREATE TABLE changes (seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
        " xid xid8 NOT NULL DEFAULT pg_current_xact_id(), at timestamptz NOT NULL DEFAULT clock_timestamp(),"
        " kind text NOT NULL, id text NOT NULL, body text NOT NULL)"
    )
    op.execute("CREATE INDEX changes_in_order ON changes (xid, seq)")
    op.execute("CREATE TABLE feed (id integer PRIMARY KEY CHECK (id = 1), pruned xid8 NOT NULL)")
    op.execute("INSERT INTO feed VALUES (1, '0')")
