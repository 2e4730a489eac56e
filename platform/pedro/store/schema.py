"""The tables of the platform's records, as the last migration leaves them. Times are Unix seconds.

A change here is a new file in `migrations/versions` too, and its revision is `REVISION`; a test compares both. What
gateways must hear of carries the number of its last change, `generation`: one counter for the whole database, which
every change takes in its own transaction, so that whoever has seen a number has seen all before it.
"""

from __future__ import annotations

import sqlalchemy as sa

REVISION = "0011"
VERSION_TABLE = "pedro_schema"
metadata = sa.MetaData()
NAME = sa.String(63)  # of a tenant or an adapter
Number = sa.BigInteger().with_variant(sa.Integer, "sqlite")  # sqlite counts up a column of this type alone


def _generation() -> sa.Column[int]:
    return sa.Column("generation", sa.BigInteger, nullable=False, server_default="0")


keys = sa.Table(
    "pedro_keys",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", NAME, nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("scopes", sa.String(100), nullable=False),
    sa.Column("hint", sa.String(4), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),  # sha256 of the secret
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("revoked", sa.Float),
    sa.Column("expires", sa.Float),
    sa.Column("last_used", sa.Float),
    sa.Column("adapters", sa.JSON(none_as_null=True)),  # the only ones that it may name; none: all of its tenant
    sa.Column("replaces", sa.String(40)),  # the key that it was made from by a rotation
    _generation(),
)
quotas = sa.Table(
    "pedro_quotas",
    metadata,
    sa.Column("subject", sa.String(80), primary_key=True),  # "tenant:acme" or "key:key_..."
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("requests_per_day", sa.BigInteger),
    sa.Column("tokens_per_day", sa.BigInteger),
    sa.Column("requests_per_month", sa.BigInteger),
    sa.Column("tokens_per_month", sa.BigInteger),
    sa.Column("training_hours_per_day", sa.BigInteger),
    sa.Column("training_hours_per_month", sa.BigInteger),
    _generation(),
)
buckets = sa.Table(  # what is left of a limit, of which gateways take leases
    "pedro_buckets",
    metadata,
    sa.Column("subject", sa.String(80), primary_key=True),
    sa.Column("what", sa.String(40), primary_key=True),  # the limit, as a column of pedro_quotas is called
    sa.Column("available", sa.Float, nullable=False),  # less the limit: 0 is all of it, whatever it is now
    sa.Column("updated", sa.Float, nullable=False),
)
jobs = sa.Table(
    "pedro_jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", NAME, nullable=False, index=True),
    sa.Column("adapter", NAME, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("submission_id", sa.String(200)),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("finished", sa.Float),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("started", sa.Float),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("wanted", sa.String(20)),  # what was asked of it and has not happened yet: paused, cancelled
    sa.Column("lease_owner", sa.String(100)),
    sa.Column("lease_until", sa.Float),
    sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),  # of two that hold a lease, the later one
    sa.Column("key_id", sa.String(40)),
    sa.Column("idempotency_key", sa.String(200)),
    sa.Column("request_digest", sa.String(64)),  # of what that key was sent with
    sa.Column("labels", sa.JSON(none_as_null=True)),  # the API's metadata
    sa.Column("estimated_finish", sa.Float),
    sa.Index("ix_pedro_jobs_idempotency", "tenant", "idempotency_key", unique=True),
)
job_events = sa.Table(
    "pedro_job_events",
    metadata,
    sa.Column("id", Number, primary_key=True),
    sa.Column("public_id", sa.String(40), nullable=False),  # by chance, as the audit's
    sa.Column("job_id", sa.String(40), nullable=False),
    sa.Column("tenant", NAME, nullable=False, index=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),  # message, metrics, checkpoint
    sa.Column("level", sa.String(10), nullable=False),  # info, warn, error
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("data", sa.JSON(none_as_null=True)),
    sa.Index("ix_pedro_job_events_job", "job_id", "id"),
)
files = sa.Table(
    "pedro_files",
    metadata,
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
batches = sa.Table(
    "pedro_batches",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", NAME, nullable=False),
    sa.Column("key_id", sa.String(40), nullable=False),
    sa.Column("endpoint", sa.String(60), nullable=False),
    sa.Column("input_file_id", sa.String(40), nullable=False),
    sa.Column("completion_window", sa.String(10), nullable=False),
    sa.Column("status", sa.String(20), nullable=False, index=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("ended", sa.Float),
    sa.Column("labels", sa.JSON(none_as_null=True)),  # the API's metadata
    sa.Column("output_expiry_s", sa.Integer),
    sa.Column("moments", sa.JSON, nullable=False),  # when it came into each state
    *(sa.Column(name, sa.Integer, nullable=False, server_default="0") for name in ("total", "completed", "failed")),
    sa.Column("output_file_id", sa.String(40)),
    sa.Column("error_file_id", sa.String(40)),
    sa.Column("errors", sa.JSON(none_as_null=True)),
    sa.Column("lease_owner", sa.String(100)),
    sa.Column("lease_until", sa.Float),
    sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),  # as of jobs
    sa.Index("ix_pedro_batches_tenant", "tenant", "created", "id"),
)
batch_answers = sa.Table(  # of batches that have not ended: lines of their files
    "pedro_batch_answers",
    metadata,
    sa.Column("batch_id", sa.String(40), primary_key=True),
    sa.Column("line", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("tenant", NAME, nullable=False, index=True),
    sa.Column("status_code", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
)
webhook_endpoints = sa.Table(
    "pedro_webhook_endpoints",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", NAME, nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("event_types", sa.JSON, nullable=False),
    sa.Column("secrets", sa.JSON, nullable=False),  # what they are made of, beside a key that is not here
    sa.Column("hint", sa.String(20), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("updated", sa.Float, nullable=False),
    sa.Column("last_delivered", sa.Float),
    sa.Column("last_failed", sa.Float),
    sa.Column("last_error", sa.Text),
    sa.Index("ix_pedro_webhook_endpoints_tenant", "tenant", "created", "id"),
)
webhook_deliveries = sa.Table(  # a row an event and endpoint, written with the change that the event tells of
    "pedro_webhook_deliveries",
    metadata,
    sa.Column("id", Number, primary_key=True),
    sa.Column("event_id", sa.String(40), nullable=False),
    sa.Column("endpoint_id", sa.String(40), nullable=False),
    sa.Column("tenant", NAME, nullable=False, index=True),
    sa.Column("type", sa.String(60), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("due", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("ended", sa.Float),
    sa.Column("outcome", sa.String(20)),  # delivered, given_up
    sa.Column("lease_owner", sa.String(100)),
    sa.Column("lease_until", sa.Float),
    sa.Column("fence", sa.BigInteger, nullable=False, server_default="0"),  # as of jobs
    sa.Index("ix_pedro_webhook_deliveries_due", "ended", "due"),
    sa.Index("ix_pedro_webhook_deliveries_endpoint", "endpoint_id", "ended"),
)
adapters = sa.Table(  # one row an adapter: where its aliases stand
    "pedro_adapters",
    metadata,
    sa.Column("tenant", NAME, primary_key=True),
    sa.Column("adapter", NAME, primary_key=True),
    _generation(),
    sa.Column("made", sa.BigInteger, nullable=False),  # the generation that made it: a name made again is another
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("aliases", sa.JSON, nullable=False),  # {"champion": 7, "previous": 6}
    sa.Column("canary", sa.JSON(none_as_null=True)),  # {"version": 8, "weight": 0.1}: that share of the champion's
    sa.Column("shadow", sa.JSON(none_as_null=True)),  # {"version": 9, "weight": 0.1}: asked that share of it as well
    sa.Column("deleted", sa.Float),  # the registry still has to hear of it
    sa.Column("mirrored", sa.BigInteger, nullable=False, server_default="0"),  # what the registry was told last
    sa.Index("ix_pedro_adapters_generation", "generation"),
)
versions = sa.Table(
    "pedro_versions",
    metadata,
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
    sa.Column("promoted", sa.Float, index=True),  # when it last became champion
    sa.Column("deleted", sa.Float),
    sa.Column("size_bytes", sa.BigInteger),
    _generation(),
)
canaries = sa.Table(  # how one canary and the champion beside it answer, summed
    "pedro_canaries",
    metadata,
    sa.Column("tenant", NAME, primary_key=True),
    sa.Column("adapter", NAME, primary_key=True),
    sa.Column("made", sa.BigInteger, nullable=False),
    sa.Column("canary", sa.Integer, nullable=False),
    sa.Column("champion", sa.Integer, nullable=False),
    sa.Column("error_looks", sa.Integer, nullable=False, server_default="0"),
    sa.Column("score_looks", sa.Integer, nullable=False, server_default="0"),
    sa.Column("verdict", sa.Text, nullable=False, server_default=""),  # why it is to be withdrawn
    *(
        sa.Column(f"{side}_{name}", kind, nullable=False, server_default="0")
        for side in ("canary", "champion")
        for name, kind in (
            ("answers", sa.BigInteger),
            ("errors", sa.BigInteger),
            ("scores", sa.BigInteger),
            ("score_sum", sa.Float),
            ("score_squares", sa.Float),
        )
    ),
)
shadows = sa.Table(  # what one shadow answered beside one champion, summed
    "pedro_shadows",
    metadata,
    sa.Column("tenant", NAME, primary_key=True),
    sa.Column("adapter", NAME, primary_key=True),
    sa.Column("made", sa.BigInteger, nullable=False),
    sa.Column("shadow", sa.Integer, nullable=False),
    sa.Column("champion", sa.Integer, nullable=False),
    *(
        sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
        for name in ("same", "different", "errors", "skipped")
    ),
    *(sa.Column(name, sa.Float, nullable=False, server_default="0") for name in ("seconds", "champion_seconds")),
)
alias_history = sa.Table(  # one row a move
    "pedro_alias_history",
    metadata,
    sa.Column("generation", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("tenant", NAME, nullable=False),
    sa.Column("adapter", NAME, nullable=False),
    sa.Column("made", sa.BigInteger, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("before", sa.JSON(none_as_null=True)),
    sa.Column("after", sa.JSON(none_as_null=True)),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("ix_pedro_alias_history_adapter", "tenant", "adapter", "generation"),
)
changes = sa.Table(  # what gateways read; rows older than the counter "changes_from" may be gone
    "pedro_changes",
    metadata,
    sa.Column("generation", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("kind", sa.String(20), primary_key=True),  # adapter, key, quota
    sa.Column("subject", sa.String(130), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
)
counters = sa.Table(
    "pedro_counters",
    metadata,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
usage = sa.Table(  # of a day (UTC), summed
    "pedro_usage",
    metadata,
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("tenant", NAME, primary_key=True),
    sa.Column("model", sa.String(200), primary_key=True),  # tenant.adapter, or the backbone's name
    sa.Column("key_id", sa.String(40), primary_key=True),
    *(
        sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
        for name in ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "training_tokens")
    ),
    sa.Column("training_seconds", sa.Float, nullable=False, server_default="0"),
    sa.Index("ix_pedro_usage_tenant", "tenant", "day"),
)
audit = sa.Table(
    "pedro_audit",
    metadata,
    sa.Column("id", Number, primary_key=True),
    sa.Column("public_id", sa.String(40), nullable=False),  # by chance: says nothing of how much others do
    sa.Column("at", sa.Float, nullable=False, index=True),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("tenant", NAME, nullable=False),
    sa.Column("action", sa.String(60), nullable=False),  # adapter.promote, key.create
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("before", sa.JSON(none_as_null=True)),
    sa.Column("after", sa.JSON(none_as_null=True)),
    sa.Column("request_id", sa.String(100)),
    sa.Index("ix_pedro_audit_tenant", "tenant", "id"),
    sa.Index("ix_pedro_audit_public_id", "public_id", unique=True),
)
