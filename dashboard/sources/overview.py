"""The platform now: counts, what is running, tokens a day, refused versions, and the news of the last day."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pedro.refs import tenant_of
from pedro.registry import CHAMPION, Registry, Version, queries
from pedro.store import JobRecord, JobStatus, Store, Usage
from sources.jobs import live_jobs
from sources.risks import Risk, refused
from sources.stores import ask_registry, ask_store
from sources.view import sees, tenant_seen, without_places

if TYPE_CHECKING:
    from pedro.config import Settings

MOST_NEWS = 200
MOST_NEW = 500  # versions of a week
DAYS = 14  # of tokens
WEEK = 7
MOST_TENANTS = 6  # with a colour of their own
REST = "all others"


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
    failed: int = 0
    """Jobs of the last day."""
    refused: tuple[Risk, ...] = ()
    """Versions of the last week that their gate refused, unless a later one followed."""
    usage: tuple[Usage, ...] = ()
    """What was served, by day and tenant, of the last `DAYS` days."""
    today: date = date.min
    """UTC, as the ledger's days."""
    news: tuple[Event, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def days(self) -> list[str]:
        """The days of `usage`, whether or not anything was served, as the ledger writes them."""
        return [(self.today - timedelta(days=ago)).isoformat() for ago in reversed(range(DAYS))]

    def tokens_on(self, ago: int) -> int:
        """Of prompts and answers, so many days ago."""
        day = (self.today - timedelta(days=ago)).isoformat()
        return sum(map(served, (used for used in self.usage if used.day == day)))


def read_overview(settings: Settings, now: float | None = None) -> Overview:
    """A handful of short questions, however many runs and adapters there are."""
    own = tenant_seen(settings)
    now = time.time() if now is None else now
    since, today = now - queries.DAY_S, datetime.fromtimestamp(now, UTC).date()
    first = (today - timedelta(days=DAYS - 1)).isoformat()
    catalog, problem = ask_registry(settings, Registry.catalog, {})
    versions, _ = ask_registry(
        settings, lambda registry: queries.new_versions(registry, now - WEEK * queries.DAY_S, MOST_NEW), []
    )
    promoted, _ = ask_registry(settings, lambda registry: queries.promotions(registry, since, MOST_NEWS), [])
    quotas, unread = ask_store(settings, Store.list_quotas, {})
    usage, _ = ask_store(settings, lambda store: store.usage(own, since=first, by=("day", "tenant")), [])
    ended, _ = ask_store(settings, lambda store: store.list_jobs(own, ended_since=since, limit=MOST_NEWS), [])
    catalog = {name: entry for name, entry in catalog.items() if sees(settings, name)}
    versions, promoted = ([each for each in found if sees(settings, each.name)] for found in (versions, promoted))
    quotas = {tenant: quota for tenant, quota in quotas.items() if own in (None, tenant)}
    live = live_jobs(settings)
    statuses = [job.status for job in live.jobs]
    champions = {name: entry.aliases.get(CHAMPION) for name, entry in catalog.items()}
    news = [*_news(versions, promoted, since), *map(_ended, ended)]
    news = [replace(event, detail=without_places(settings, event.detail)) for event in news]
    risks = [replace(risk, detail=without_places(settings, risk.detail)) for risk in refused(versions, champions)]
    return Overview(
        tenants=tuple(sorted({tenant_of(name) for name in catalog} | set(quotas))),
        adapters=len(catalog),
        in_service=sum(number is not None for number in champions.values()),
        running=statuses.count(JobStatus.RUNNING),
        queued=statuses.count(JobStatus.QUEUED),
        lost=statuses.count("lost"),
        failed=sum(job.status == JobStatus.FAILED for job in ended),
        refused=tuple(risks),
        usage=tuple(used for used in usage if used.tenant and used.day <= today.isoformat()),
        today=today,
        news=tuple(sorted(news, key=lambda event: -event.at))[:MOST_NEWS],
        problems=tuple(filter(None, (problem, unread))),
    )


def served(used: Usage) -> int:
    """Tokens of prompts and answers."""
    return used.prompt_tokens + used.completion_tokens


def token_rows(usage: Iterable[Usage]) -> list[dict[str, Any]]:
    """One row a day and tenant; all but the tenants that used most are together `REST`."""
    totals, tokens, requests = Counter[str](), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    kept = list(usage)
    for used in kept:
        totals[used.tenant] += served(used)
    named = [tenant for tenant, _ in totals.most_common(MOST_TENANTS)]
    for used in kept:
        key = used.day, used.tenant if used.tenant in named else REST
        tokens[key] += served(used)
        requests[key] += used.requests
    order = {tenant: index for index, tenant in enumerate([*named, REST])}
    return [
        {"day": day, "tenant": tenant, "tokens": tokens[day, tenant], "requests": requests[day, tenant]}
        for day, tenant in sorted(tokens, key=lambda key: (key[0], order[key[1]]))
        if tokens[day, tenant]
    ]


def _news(versions: Iterable[Version], promoted: Iterable[Version], since: float) -> list[Event]:
    made = [Event(_seconds(version.created), "new version", version.ref, version.gate) for version in versions]
    moved = [Event(_seconds(version.promoted), "promoted", version.ref, "now the champion") for version in promoted]
    return [event for event in made if event.at >= since] + moved


def _ended(record: JobRecord) -> Event:
    detail = record.message or str((record.result or {}).get("gate", ""))
    return Event(record.finished or 0.0, f"job {record.status}", record.name, detail)


def _seconds(utc: str) -> float:
    return datetime.strptime(utc, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
