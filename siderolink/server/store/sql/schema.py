"""The migrations of the schema, one linear history for SQLite and Postgres.

A migration only adds; the next release removes what the previous one no longer needs. So while the servers of a Postgres
database are replaced one by one, those of the previous release continue to work with the newer schema. A release records in the
database which older programs can use its schema.
"""

from pathlib import Path

from sqlalchemy import Connection

from siderolink.common.errors import StoreError
from siderolink.common.text import one_line
from siderolink.server.store.sql.tables import HEAD

__all__ = ["HEAD", "USABLE_SINCE", "upgrade"]

USABLE_SINCE = 3
"""The oldest HEAD whose programs can use this schema: that of the previous release, or the first on Postgres."""


def upgrade(connection: Connection, version: str | None, where: str) -> None:
    """Run the migrations that a schema of this version lacks, in the current transaction.

    Raises StoreError for a schema that this program does not know; `where` describes the database in its message.
    """
    from alembic.command import upgrade
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if version is not None and version not in known:
        raise StoreError(
            f"{where} was written by a newer siderolink (its schema is {one_line(version, limit=32)}, "
            f"this one knows {HEAD}); it was not changed"
        )
    upgrade(config, "head")
