"""A version's seal stands in MLflow's tags, where it is needed; the store's own rows never had one."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.drop_column("pedro_versions", "seal")
