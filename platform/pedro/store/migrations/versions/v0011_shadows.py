"""Shadows of champions, and how they answer."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    shadow = sa.JSON(none_as_null=True)
    op.add_column("pedro_adapters", sa.Column("shadow", shadow))
    counts = ("same", "different", "errors", "skipped")
    op.create_table(
        "pedro_shadows",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("adapter", sa.String(63), primary_key=True),
        sa.Column("made", sa.BigInteger, nullable=False),
        sa.Column("shadow", sa.Integer, nullable=False),
        sa.Column("champion", sa.Integer, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in counts),
        *(sa.Column(name, sa.Float, nullable=False, server_default="0") for name in ("seconds", "champion_seconds")),
    )
