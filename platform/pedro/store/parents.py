"""Parents: versions that jobs start from. Such a version stays until the last of these jobs has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from pedro.errors import ConflictError, NotFoundError
from pedro.refs import ModelRef
from pedro.store import schema
from pedro.store.adapter_rows import version_row
from pedro.store.records import NEXT, JobStatus

UNENDED = [status.value for status in JobStatus if NEXT[status]]
PARENT = schema.jobs.c.spec["parent"].as_string()


def refuse_parent(connection: sa.Connection, ref: ModelRef, version: int | None = None) -> None:
    """Raise ConflictError where a job that has not ended goes on from this version, or from any of the adapter."""
    here = str(ref.at(version)) == PARENT if version else PARENT.startswith(f"{ref.name}:", autoescape=True)
    jobs = schema.jobs.c
    query = sa.select(jobs.id, PARENT.label("parent")).where(jobs.tenant == ref.tenant, jobs.status.in_(UNENDED), here)
    row = connection.execute(query.order_by(jobs.created, jobs.id).limit(1)).one_or_none()
    if row is not None:
        message = f"{row.parent}: the job {row.id} goes on from it; wait until that has ended, or stop it"
        raise ConflictError(message, param="version")


def check_parent(connection: sa.Connection, spec: Mapping[str, Any]) -> None:
    """Raise NotFoundError for a spec whose parent is there no more. For a transaction that has taken its turn, as those
    that delete have."""
    if spec.get("parent") is None:
        return
    ref = ModelRef.parse(str(spec["parent"]))
    if version_row(connection, ref, ref.number) is None:
        message = f"parent: {ref.without_digest} was deleted meanwhile"
        raise NotFoundError(message, param="parent", code="model_not_found")
