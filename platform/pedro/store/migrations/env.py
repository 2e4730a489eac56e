"""Run by alembic: the migrations, on the connection that `migrate.py` hands over, in its one transaction."""

from alembic import context

from pedro.store import schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=schema.metadata,
    version_table=schema.VERSION_TABLE,  # MLflow has one of the usual name, perhaps in the same database
    transactional_ddl=True,  # sqlite can, once it is told to begin (see database.py)
)
context.run_migrations()
