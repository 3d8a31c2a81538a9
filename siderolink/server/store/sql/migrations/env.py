"""Alembic's entry point: runs the migrations on the store's connection."""

from alembic import context

from siderolink.server.store.sql.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
