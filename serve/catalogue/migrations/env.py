"""What Alembic runs the steps in: the connection that migration.py hands it, within one transaction."""

from __future__ import annotations

from alembic import context

from serve.catalogue.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite changes a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
