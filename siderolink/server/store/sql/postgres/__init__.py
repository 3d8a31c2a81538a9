"""A store on Postgres, which several servers may share (extra: ``siderolink[postgres]``)."""

from siderolink.server.store.sql.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
