"""Alembic's environment. `Database.migrate` brings the connection; nothing else runs migrations."""

from alembic import context

from jobs.records import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
context.run_migrations()
