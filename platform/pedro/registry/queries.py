"""Runs and versions as people look at them: in bulk, paged, newest first. Only reads.

Everything here raises UnavailableError if the registry does not answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pedro.registry.tags import PREFIX, ours

if TYPE_CHECKING:
    from mlflow.entities import Run

    from pedro.registry.models import Registry
    from pedro.store import Version

RUNNING = "RUNNING"
DAY_S = 24 * 3600


@dataclass(frozen=True)
class TrackedRun:
    """One run: what was asked for (`params`), the last value of each metric, and our own tags."""

    id: str
    name: str
    model: str
    """`tenant.adapter`, or what else the experiment is called."""
    status: str
    started: float
    ended: float | None
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]

    @property
    def job(self) -> str:
        """The job that it is the run of; empty for a trial of a sweep."""
        return self.tags.get("job", "")


@dataclass(frozen=True)
class RunPage:
    """Some runs, and the token that asks for those after them; None at the end."""

    runs: tuple[TrackedRun, ...]
    after: str | None


def experiment_names(registry: Registry) -> list[str]:
    """Names of the experiments, those that were written to last first; MLflow's own default is none."""
    with registry.answering():
        experiments = list(registry.pages(registry.client.search_experiments))
    named = [experiment for experiment in experiments if experiment.name != "Default"]
    return [experiment.name for experiment in sorted(named, key=lambda one: -(one.last_update_time or 0))]


def search_runs(
    registry: Registry,
    models: Sequence[str],
    *,
    status: str | None = None,
    tags: dict[str, str] | None = None,
    limit: int = 100,
    after: str | None = None,
) -> RunPage:
    """Runs of some models, newest first. A model without runs has none."""
    conditions = [f"attributes.status = '{status}'"] if status else []
    conditions += [f"tags.`{PREFIX}{key}` = '{_quoted(value)}'" for key, value in (tags or {}).items()]
    with registry.answering():
        names = _experiments(registry, models)
        if not names:
            return RunPage((), None)
        page = registry.client.search_runs(
            list(names),
            filter_string=" and ".join(conditions),
            max_results=limit,
            order_by=["attributes.start_time DESC"],
            page_token=after,
        )
    return RunPage(tuple(_run(entity, names) for entity in page), page.token or None)


def find_run_of_job(registry: Registry, model: str, job_id: str) -> TrackedRun | None:
    """The run that a job writes to, once it has begun one."""
    runs = search_runs(registry, [model], tags={"job": job_id}, limit=1).runs
    return runs[0] if runs else None


def metric_histories(
    registry: Registry, run_ids: Sequence[str], metrics: Sequence[str]
) -> list[tuple[str, str, int, float]]:
    """(run, metric, step, value) of several runs, in the order of steps. A run that is gone has no points."""
    with registry.answering():
        return [
            (run_id, metric, step, value)
            for run_id in run_ids
            for metric in metrics
            for step, value in registry.metric_history(run_id, metric)
        ]


def new_versions(registry: Registry, since: float, limit: int = 200) -> list[Version]:
    """The versions that were registered since a time (Unix seconds), newest first; at most `limit`."""
    return registry.store.newest_versions(since, limit)


def promotions(registry: Registry, since: float, limit: int = 200) -> list[Version]:
    """The versions that became champion since a time (Unix seconds), the last first; at most `limit`."""
    return registry.store.newest_versions(since, limit, promoted=True)


def _experiments(registry: Registry, models: Sequence[str]) -> dict[str, str]:
    """Ids and names of the experiments."""
    experiments = (registry.client.get_experiment_by_name(model) for model in models)
    return {experiment.experiment_id: experiment.name for experiment in experiments if experiment is not None}


def _run(entity: Run, names: dict[str, str]) -> TrackedRun:
    info, data = entity.info, entity.data
    return TrackedRun(
        id=info.run_id,
        name=info.run_name or info.run_id,
        model=names[info.experiment_id],
        status=info.status,
        started=info.start_time / 1000,
        ended=info.end_time / 1000 if info.end_time else None,
        params=dict(data.params),
        metrics=dict(data.metrics),
        tags=ours(data.tags),
    )


def _quoted(text: str) -> str:
    return text.replace("'", "").replace("\\", "")
