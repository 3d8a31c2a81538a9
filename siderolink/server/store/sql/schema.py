"""The one history of the schema, for SQLite and Postgres.

A migration only adds; what the program of the release before does not need is removed by the next one. So while the servers of
a Postgres database are replaced one after the other, those of the release before go on with the newer schema. The release that
brings a schema up to its own writes there whose programs that are.
"""

from pathlib import Path

from sqlalchemy import Connection

from siderolink.common.errors import StoreError
from siderolink.common.text import one_line
from siderolink.server.store.sql.tables import HEAD

__all__ = ["HEAD", "USABLE_SINCE", "upgrade"]

USABLE_SINCE = 3
"""The oldest HEAD whose programs can use this schema: that of the release before, or the first on Postgres."""


def upgrade(connection: Connection, version: str | None, where: str) -> None:
    """Run the migrations that a schema of this version lacks, all in the transaction that runs.

    Raises StoreError for a schema that this program does not know; `where` names the database for people.
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
