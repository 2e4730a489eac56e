"""What an idempotency key was sent with, as it was given."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("pedro_jobs", sa.Column("request_digest", sa.String(64)))
