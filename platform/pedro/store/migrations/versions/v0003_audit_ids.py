"""Ids of the audit by chance: counted ones would tell a tenant how much is done for others."""

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

TOGETHER = 1000


def upgrade() -> None:
    op.add_column("pedro_audit", sa.Column("public_id", sa.String(40)))
    audit = sa.table("pedro_audit", sa.column("id", sa.BigInteger), sa.column("public_id", sa.String))
    connection = op.get_bind()
    named = sa.update(audit).where(audit.c.id == sa.bindparam("of")).values(public_id=sa.bindparam("name"))
    last = -1
    first = sa.select(audit.c.id).order_by(audit.c.id).limit(TOGETHER)
    while rows := connection.scalars(first.where(audit.c.id > last)).all():
        connection.execute(named, [{"of": row, "name": f"audit_log-{secrets.token_hex(12)}"} for row in rows])
        last = rows[-1]
    with op.batch_alter_table("pedro_audit") as table:
        table.alter_column("public_id", existing_type=sa.String(40), nullable=False)
    op.create_index("ix_pedro_audit_public_id", "pedro_audit", ["public_id"], unique=True)
