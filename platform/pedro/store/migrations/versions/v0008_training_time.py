"""Budgets of hours that a tenant's jobs may train, and when a job is expected to have trained."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    for name in ("training_hours_per_day", "training_hours_per_month"):
        op.add_column("pedro_quotas", sa.Column(name, sa.BigInteger))
    op.add_column("pedro_jobs", sa.Column("estimated_finish", sa.Float))
