"""Webhooks: tenants' endpoints, and what is to be sent to each."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "pedro_webhook_endpoints",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("event_types", sa.JSON, nullable=False),
        sa.Column("secrets", sa.JSON, nullable=False),
        sa.Column("hint", sa.String(20), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.Column("last_delivered", sa.Float),
        sa.Column("last_failed", sa.Float),
        sa.Column("last_error", sa.Text),
        sa.Index("ix_pedro_webhook_endpoints_tenant", "tenant", "created", "id"),
    )
    op.create_table(
        "pedro_webhook_deliveries",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("event_id", sa.String(40), nullable=False),
        sa.Column("endpoint_id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False, index=True),
        sa.Column("type", sa.String(60), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("due", sa.Float, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("ended", sa.Float),
        sa.Column("outcome", sa.String(20)),
        sa.Column("lease_owner", sa.String(100)),
        sa.Column("lease_until", sa.Float),
        sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Index("ix_pedro_webhook_deliveries_due", "ended", "due"),
        sa.Index("ix_pedro_webhook_deliveries_endpoint", "endpoint_id", "ended"),
    )
