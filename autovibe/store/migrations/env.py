"""Alembic's entry: `store.schema` hands over a connection that is in a transaction already."""

from alembic import context
from sqlmodel import SQLModel

import autovibe.domain
import autovibe.store.tables  # noqa: F401 - both declare tables

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=SQLModel.metadata,
    render_as_batch=True,
    transactional_ddl=True,  # alembic takes SQLite for a database that cannot
)
with context.begin_transaction():
    context.run_migrations()
