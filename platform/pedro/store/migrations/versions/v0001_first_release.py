"""Keys, quotas and jobs, as release 0.1.0 made them: made where they are missing, taken over where they are not."""

import sqlalchemy as sa
from alembic import op

from pedro.errors import ConfigError

revision = "0001"
down_revision = None

metadata = sa.MetaData()
TABLES = (
    sa.Table(
        "pedro_keys",
        metadata,
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False, index=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("scopes", sa.String(100), nullable=False),
        sa.Column("hint", sa.String(4), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("revoked", sa.Float),
    ),
    sa.Table(
        "pedro_quotas",
        metadata,
        sa.Column("subject", sa.String(80), primary_key=True),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("tokens_per_minute", sa.BigInteger),
    ),
    sa.Table(
        "pedro_jobs",
        metadata,
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False, index=True),
        sa.Column("adapter", sa.String(63), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("status", sa.String(20), nullable=False, index=True),
        sa.Column("submission_id", sa.String(200)),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("finished", sa.Float),
        sa.Column("result", sa.JSON(none_as_null=True)),
        sa.Column("message", sa.Text, nullable=False),
    ),
)


def upgrade() -> None:
    connection = op.get_bind()
    metadata.create_all(connection)  # those that are there already stay as they are
    found = sa.inspect(connection)
    for table in TABLES:
        there = {column["name"] for column in found.get_columns(table.name)}
        for column in (column for column in table.columns if column.name not in there):
            if not column.nullable:
                raise ConfigError(
                    f"its table {table.name} lacks the column {column.name}: another program made it; restore a "
                    "backup, or point PEDRO_DATABASE_URL at another database",
                    param="database_url",
                )
            op.add_column(table.name, sa.Column(column.name, column.type))
        indexed = {index["name"] for index in found.get_indexes(table.name)}
        for index in (index for index in table.indexes if index.name not in indexed):
            index.create(connection)
