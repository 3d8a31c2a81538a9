"""A store in a SQLite file (extra: ``siderolink[sql]``)."""

from siderolink.server.store.sql.store import SqlStore

__all__ = ["SqlStore"]
