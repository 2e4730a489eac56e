"""The control plane: adapters with their aliases, versions, history, changes, files, usage, audit; keys that expire.

What the registry held until now is taken over afterwards, by `Registry.take_over`.
"""

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

NAME = sa.String(63)


def _zero(name: str, kind: type[sa.types.TypeEngine[Any]]) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, server_default="0")


def _json() -> sa.JSON:
    return sa.JSON(none_as_null=True)


def upgrade() -> None:
    for table, columns in _added().items():
        for column in columns:
            op.add_column(table, column)
    op.create_index("ix_pedro_jobs_idempotency", "pedro_jobs", ["tenant", "idempotency_key"], unique=True)
    _adapters()
    _feed()
    _accounts()


def _added() -> dict[str, tuple[sa.Column[Any], ...]]:
    return {
        "pedro_keys": (
            sa.Column("expires", sa.Float),
            sa.Column("last_used", sa.Float),
            sa.Column("adapters", _json()),
            sa.Column("replaces", sa.String(40)),
            _zero("generation", sa.BigInteger),
        ),
        "pedro_quotas": (
            sa.Column("requests_per_day", sa.BigInteger),
            sa.Column("tokens_per_day", sa.BigInteger),
            sa.Column("requests_per_month", sa.BigInteger),
            sa.Column("tokens_per_month", sa.BigInteger),
            _zero("generation", sa.BigInteger),
        ),
        "pedro_jobs": (
            sa.Column("started", sa.Float),
            _zero("priority", sa.Integer),
            _zero("attempt", sa.Integer),
            sa.Column("wanted", sa.String(20)),
            sa.Column("lease_owner", sa.String(100)),
            sa.Column("lease_until", sa.Float),
            _zero("fence", sa.BigInteger),
            sa.Column("key_id", sa.String(40)),
            sa.Column("idempotency_key", sa.String(200)),
            sa.Column("labels", _json()),
        ),
    }


def _adapters() -> None:
    op.create_table(
        "pedro_adapters",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("adapter", NAME, primary_key=True),
        _zero("generation", sa.BigInteger),
        sa.Column("made", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("aliases", sa.JSON, nullable=False),
        sa.Column("canary", _json()),
        sa.Column("deleted", sa.Float),
        _zero("mirrored", sa.BigInteger),
        sa.Index("ix_pedro_adapters_generation", "generation"),
    )
    op.create_table(
        "pedro_versions",
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("adapter", NAME, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(80), nullable=False),
        sa.Column("manifest_digest", sa.String(80), nullable=False),
        sa.Column("backbone_id", sa.Text, nullable=False),
        sa.Column("backbone_digest", sa.String(80), nullable=False),
        sa.Column("method", sa.String(100), nullable=False),
        sa.Column("trainable_parameters", sa.BigInteger, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("gate", sa.Text, nullable=False),
        sa.Column("run_id", sa.String(64), nullable=False),
        sa.Column("created", sa.Float, nullable=False, index=True),
        sa.Column("promoted", sa.Float, index=True),
        sa.Column("deleted", sa.Float),
        sa.Column("size_bytes", sa.BigInteger),
        sa.Column("seal", sa.String(80)),
        _zero("generation", sa.BigInteger),
    )
    op.create_table(
        "pedro_alias_history",
        sa.Column("generation", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant", NAME, nullable=False),
        sa.Column("adapter", NAME, nullable=False),
        sa.Column("made", sa.BigInteger, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("before", _json()),
        sa.Column("after", _json()),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Index("ix_pedro_alias_history_adapter", "tenant", "adapter", "generation"),
    )


def _feed() -> None:
    op.create_table(
        "pedro_changes",
        sa.Column("generation", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(20), primary_key=True),
        sa.Column("subject", sa.String(130), primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
    )
    counters = op.create_table(
        "pedro_counters",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    start = {"generation": 0, "changes_from": 0, "imported": 0, "epoch": secrets.randbits(62)}
    op.bulk_insert(counters, [{"name": name, "value": value} for name, value in start.items()])


def _accounts() -> None:
    op.create_table(
        "pedro_buckets",
        sa.Column("subject", sa.String(80), primary_key=True),
        sa.Column("what", sa.String(40), primary_key=True),
        sa.Column("available", sa.Float, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
    )
    op.create_table(
        "pedro_files",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", NAME, nullable=False, index=True),
        sa.Column("filename", sa.String(300), nullable=False),
        sa.Column("purpose", sa.String(40), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.String(80), nullable=False, index=True),
        sa.Column("location", sa.Text, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float, index=True),
        sa.Column("key_id", sa.String(40)),
    )
    op.create_table(
        "pedro_usage",
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("tenant", NAME, primary_key=True),
        sa.Column("model", sa.String(200), primary_key=True),
        sa.Column("key_id", sa.String(40), primary_key=True),
        *(
            _zero(name, sa.BigInteger)
            for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "training_tokens")
        ),
        _zero("training_seconds", sa.Float),
        sa.Index("ix_pedro_usage_tenant", "tenant", "day"),
    )
    op.create_table(
        "pedro_audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("at", sa.Float, nullable=False, index=True),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("tenant", NAME, nullable=False),
        sa.Column("action", sa.String(60), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("before", _json()),
        sa.Column("after", _json()),
        sa.Column("request_id", sa.String(100)),
        sa.Index("ix_pedro_audit_tenant", "tenant", "id"),
    )
