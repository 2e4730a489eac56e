"""Erases a tenant: keys, quotas, jobs, data, adapters, runs, caches, rows. Others' stay, byte for byte.

The outline: refuse the tenant, end its jobs, remove its files and what MLflow has, delete its rows, overwrite what the
databases' files still held of them, free the name. Each step can be made again: one that was broken off is ended by
the next.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pedro.config import check_name
from pedro.errors import NotFoundError, UnavailableError
from pedro.registry.purge import hidden_experiments, overwrite_free_pages
from pedro.retention.collector import KindTotal, only_collector
from pedro.retention.policy import Retention
from pedro.retention.tenant_files import TenantFiles
from pedro.retention.view import View
from pedro.training.job_status import RAY_OPEN

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry import Registry
    from pedro.training.job_status import ClusterJobs

WAIT_S = 30.0
Log = Callable[[str], None]


@dataclass
class Erased:
    """What was erased, or would be."""

    tenant: str
    dry_run: bool
    number: str = ""
    """Under which the audit, and usage whose sums are kept, have it."""
    rows: dict[str, int] = field(default_factory=dict)
    files: dict[str, KindTotal] = field(default_factory=dict)
    at_server: int = 0
    """Runs and experiments that MLflow's server has hidden, and removes with `mlflow gc` only."""
    hidden_experiments: list[str] = field(default_factory=list)
    """Ids of all experiments that it hides since a tenant was erased; their runs go with them."""


def erase_tenant(
    tenant: str,
    settings: Settings,
    registry: Registry,
    cluster: Callable[[], ClusterJobs],
    stop: Callable[[str], None],
    *,
    keep_sums: bool = False,
    dry_run: bool = False,
    log: Log = lambda _line: None,
) -> Erased:
    """Erase a tenant, or only count. `cluster` tells what runs; `stop` ends a job and returns when it has ended.

    Raises NotFoundError for a name of which there is nothing, ConflictError where a collector is at work, and
    UnavailableError where something cannot be reached: the tenant is refused from then on, and the same call ends it.
    """
    check_name("tenant", tenant)
    store = registry.store
    done = Erased(tenant, dry_run, rows={kind: count for kind, count in store.count_of(tenant).items() if count})
    if dry_run:
        _files(TenantFiles(_view(settings, registry, cluster()), tenant), done, log)
        _check_known(done, store.is_being_erased(tenant))
        return done
    with only_collector(settings, WAIT_S):
        if not done.rows and not store.is_being_erased(tenant):
            found = Erased(tenant, dry_run=True)
            _files(TenantFiles(_view(settings, registry, cluster()), tenant), found, log)
            _check_known(found, begun=False)
        log(f"refusing {tenant}: its keys end, its adapters are gone")
        store.begin_erasure(tenant)
        told = cluster()
        _end_jobs(TenantFiles(_view(settings, registry, told), tenant), told, stop, log)
        _files(TenantFiles(_view(settings, registry, cluster()), tenant), done, log)
        done.hidden_experiments = hidden_experiments(registry)
        done.number = f"erased-{secrets.token_hex(6)}"
        log("deleting rows")
        store.erase_rows(tenant, done.number, keep_sums=keep_sums)
        log("overwriting what the databases' files held")
        store.overwrite_free_pages()
        overwrite_free_pages(registry)
        counts = {**done.rows, **{kind: total.removed for kind, total in done.files.items()}}
        store.end_erasure(tenant, done.number, counts)
    return done


def _view(settings: Settings, registry: Registry, cluster: ClusterJobs) -> View:
    return View(settings, registry, Retention.from_env({}), cluster)


def _check_known(done: Erased, begun: bool) -> None:
    if not begun and not done.rows and not any(total.removed for total in done.files.values()):
        raise NotFoundError(f"tenant: there is nothing of {done.tenant!r} here; `pedro tenants list`", param="tenant")


def _end_jobs(files: TenantFiles, cluster: ClusterJobs, stop: Callable[[str], None], log: Log) -> None:
    """End what runs of the tenant. Raises UnavailableError where it cannot be known that it has ended."""
    if not cluster.answered and files.owners:
        raise UnavailableError(
            f"whether jobs of {files.tenant} still run cannot be known ({cluster.problem}); the tenant is refused "
            "already; once the cluster answers, run the same command again"
        )
    for job, facts in cluster.jobs.items():
        told = facts.get("metadata") or {}
        shared = not files.owners.isdisjoint(told.get("jobs", "").split())  # the others' jobs resume by themselves
        if facts["status"] in RAY_OPEN and (shared or told.get("tenant") == files.tenant):
            log(f"ending {job}")
            stop(job)


def _files(files: TenantFiles, done: Erased, log: Log) -> None:
    """Remove, or count, what there is outside the database. Raises the first UnavailableError: it is made again."""
    last = ""
    for finding in files.findings():
        if finding.kind != last:
            log(f"{'counting' if done.dry_run else 'removing'} {finding.kind}")
            last = finding.kind
        if finding.remove is not None and not done.dry_run:
            try:
                done.at_server += not finding.remove()
            except OSError as error:
                raise UnavailableError(f"{finding.name}: {error}; run the same command again") from error
        total = done.files.setdefault(finding.kind, KindTotal())
        total.removed, total.bytes = total.removed + 1, total.bytes + finding.bytes
