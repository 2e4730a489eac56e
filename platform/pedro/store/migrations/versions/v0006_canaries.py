"""How canaries and the champions beside them answer."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    sums = [
        sa.Column(f"{side}_{name}", kind, nullable=False, server_default="0")
        for side in ("canary", "champion")
        for name, kind in (
            ("answers", sa.BigInteger),
            ("errors", sa.BigInteger),
            ("scores", sa.BigInteger),
            ("score_sum", sa.Float),
            ("score_squares", sa.Float),
        )
    ]
    op.create_table(
        "pedro_canaries",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("adapter", sa.String(63), primary_key=True),
        sa.Column("made", sa.BigInteger, nullable=False),
        sa.Column("canary", sa.Integer, nullable=False),
        sa.Column("champion", sa.Integer, nullable=False),
        sa.Column("error_looks", sa.Integer, nullable=False, server_default="0"),
        sa.Column("score_looks", sa.Integer, nullable=False, server_default="0"),
        sa.Column("verdict", sa.Text, nullable=False, server_default=""),
        *sums,
    )
