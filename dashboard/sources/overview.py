"""The platform at a glance: counts, what is running, and the news of the last day."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pedro.refs import tenant_of
from pedro.registry import CHAMPION, Registry, queries
from pedro.store import JobRecord, JobStatus, Store
from sources.jobs import live_jobs
from sources.stores import ask_registry, ask_store

if TYPE_CHECKING:
    from pedro.config import Settings

MOST_NEWS = 200


@dataclass(frozen=True)
class Event:
    """Something that happened; `at` in Unix seconds."""

    at: float
    what: str
    name: str
    detail: str = ""


@dataclass(frozen=True)
class Overview:
    """Counts, and the news of the last day, newest first. `problems` says what could not be read."""

    tenants: tuple[str, ...] = ()
    adapters: int = 0
    in_service: int = 0
    running: int = 0
    queued: int = 0
    lost: int = 0
    news: tuple[Event, ...] = ()
    problems: tuple[str, ...] = ()


def read_overview(settings: Settings, now: float | None = None) -> Overview:
    """A handful of short questions, however many runs and adapters there are."""
    since = (time.time() if now is None else now) - queries.DAY_S
    catalog, problem = ask_registry(settings, Registry.catalog, {})
    versions, _ = ask_registry(settings, lambda registry: _versions(registry, since), [])
    quotas, unread = ask_store(settings, Store.list_quotas, {})
    ended, _ = ask_store(settings, lambda store: store.list_jobs(ended_since=since, limit=MOST_NEWS), [])
    live = live_jobs(settings)
    statuses = [job.status for job in live.jobs]
    return Overview(
        tenants=tuple(sorted({tenant_of(name) for name in catalog} | set(quotas))),
        adapters=len(catalog),
        in_service=sum(CHAMPION in entry.aliases for entry in catalog.values()),
        running=statuses.count(JobStatus.RUNNING),
        queued=statuses.count(JobStatus.QUEUED),
        lost=statuses.count("lost"),
        news=tuple(sorted([*versions, *map(_ended, ended)], key=lambda event: -event.at))[:MOST_NEWS],
        problems=tuple(filter(None, (problem, unread))),
    )


def _versions(registry: Registry, since: float) -> list[Event]:
    made = [
        Event(_seconds(version.created), "new version", version.ref, version.gate)
        for version in queries.new_versions(registry, since, MOST_NEWS)
    ]
    promoted = [
        Event(_seconds(version.promoted), "promoted", version.ref, "the champion since then")
        for version in queries.promotions(registry, since, MOST_NEWS)
    ]
    return made + promoted


def _ended(record: JobRecord) -> Event:
    detail = record.message or str((record.result or {}).get("gate", ""))
    return Event(record.finished or 0.0, f"job {record.status}", f"{record.tenant}.{record.adapter}", detail)


def _seconds(utc: str) -> float:
    return datetime.strptime(utc, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
