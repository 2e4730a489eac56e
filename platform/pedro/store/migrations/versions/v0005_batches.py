"""Batches of requests, and their answers until these are written out."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def _json() -> sa.JSON:
    return sa.JSON(none_as_null=True)


def upgrade() -> None:
    op.create_table(
        "pedro_batches",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(40), nullable=False),
        sa.Column("endpoint", sa.String(60), nullable=False),
        sa.Column("input_file_id", sa.String(40), nullable=False),
        sa.Column("completion_window", sa.String(10), nullable=False),
        sa.Column("status", sa.String(20), nullable=False, index=True),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, nullable=False),
        sa.Column("ended", sa.Float),
        sa.Column("labels", _json()),
        sa.Column("output_expiry_s", sa.Integer),
        sa.Column("moments", sa.JSON, nullable=False),
        *(sa.Column(name, sa.Integer, nullable=False, server_default="0") for name in ("total", "completed", "failed")),
        sa.Column("output_file_id", sa.String(40)),
        sa.Column("error_file_id", sa.String(40)),
        sa.Column("errors", _json()),
        sa.Column("lease_owner", sa.String(100)),
        sa.Column("lease_until", sa.Float),
        sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Index("ix_pedro_batches_tenant", "tenant", "created", "id"),
    )
    op.create_table(
        "pedro_batch_answers",
        sa.Column("batch_id", sa.String(40), primary_key=True),
        sa.Column("line", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("tenant", sa.String(63), nullable=False, index=True),
        sa.Column("status_code", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
