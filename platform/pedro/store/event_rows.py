"""Events of a job, written in the transaction that they report: its end is reported with the end, exactly once."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pedro.store import schema
from pedro.store.records import JobStatus

MESSAGE, METRICS, CHECKPOINT = "message", "metrics", "checkpoint"
MOST_MESSAGE = 2000
LEVELS = {JobStatus.FAILED: "error", JobStatus.CANCELLED: "warn"}


@dataclass(frozen=True)
class NewEvent:
    """An event that a job is to have."""

    message: str
    kind: str = MESSAGE
    level: str = "info"
    data: dict[str, Any] | None = None


def end_event(status: JobStatus, message: str) -> NewEvent:
    """How a job ended, or that it was paused."""
    told = message if status == JobStatus.FAILED and message else f"The job was {status}"
    return NewEvent(told, level=LEVELS.get(status, "info"))


def insert_events(connection: sa.Connection, job_id: str, tenant: str, events: Iterable[NewEvent]) -> None:
    """Add them to the job's, in this order."""
    for event in events:  # one by one: their order is that of their ids
        row = {**event.__dict__, "message": event.message[:MOST_MESSAGE], "job_id": job_id, "tenant": tenant}
        connection.execute(sa.insert(schema.job_events).values(**row, at=time.time(), public_id=secrets.token_hex(12)))
