"""Runs in MLflow as runs of a comparison, so that jobs can be compared like a grid.

An adapter is a task. Methods of one kind are told apart by the parameters in which they differ; runs that differ only
in their seed are the seeds of one method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pedro.comparison.result_model import FINAL, FINISHED, Comparison, RunResult, TaskResult
from pedro.registry import Registry, queries, utc
from sources.compare import CURVES
from sources.stores import ask_registry, is_there
from sources.view import names_seen, without_places

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry.queries import TrackedRun

NAME = "mlflow/runs"  # beside results/… and home/…
TITLE = "Jobs, by their runs in MLflow"
OF_COMPARISONS = "comparison."  # experiments that a comparison's folder holds already
MOST = 200
MOST_CURVES = 60
NOTHING_EQUAL = ""  # nobody planned these jobs to be compared
KEPT = ("method.", "training.", "backbone", "resources.zero_stage")
SEED = "training.seed"


def may_have_any(settings: Settings) -> bool:
    """Whether there is a registry that may hold runs: it is read only for who wants them."""
    return is_there(settings.tracking_uri)


def read_models(settings: Settings) -> tuple[list[str], str]:
    """The adapters that have runs, the last used first; and what went wrong."""
    names, problem = ask_registry(settings, queries.experiment_names, [])
    return [name for name in names_seen(settings, names) if not name.startswith(OF_COMPARISONS)], problem


def read_runs(settings: Settings, models: Sequence[str]) -> tuple[Comparison, str]:
    """The newest finished runs of some adapters as a comparison; and what went wrong."""
    models = names_seen(settings, models)

    def read(registry: Registry) -> tuple[tuple[TrackedRun, ...], dict[str, int]]:
        page = queries.search_runs(registry, models, status="FINISHED", limit=MOST)
        sizes = {v.run_id: v.trainable_parameters for model in models for v in registry.versions(model)}
        return tuple(replace(run, params=without_places(settings, run.params)) for run in page.runs), sizes

    (runs, sizes), problem = ask_registry(settings, read, ((), {}))
    scored = [run for run in runs if "final/accuracy" in run.metrics]
    results = tuple(
        _result(run, label, sizes.get(run.id, 0)) for run, label in zip(scored, _labels(scored), strict=True)
    )
    return Comparison(Path(NAME), "runs", TITLE, NOTHING_EQUAL, "", results, (), {}), problem


def with_curves(settings: Settings, results: Iterable[RunResult], task: str) -> list[RunResult]:
    """The runs of one adapter with their curves; the newest of them, where there are many."""
    mine = [result for result in results if result.task == task][:MOST_CURVES]
    read = partial(queries.metric_histories, run_ids=[result.id for result in mine], metrics=list(CURVES))
    points, _ = ask_registry(settings, read, [])
    drawn: dict[str, dict[str, list[list[float]]]] = {}
    for run_id, metric, step, value in points:
        drawn.setdefault(run_id, {}).setdefault(metric, []).append([step, value])
    return [replace(result, curves=drawn.get(result.id, {})) for result in mine]


def _labels(runs: Sequence[TrackedRun]) -> list[str]:
    """The method's name, and the parameters, other than the seed, in which runs of that method differ."""
    values: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for key, value in _asked(run).items():
            values.setdefault(_method(run), {}).setdefault(key, set()).add(value)
    labels = []
    for run in runs:
        mine = _asked(run)
        apart = [key for key, seen in values.get(_method(run), {}).items() if len(seen) > 1 and key in mine]
        labels.append(" ".join([_method(run), *(f"{key.rpartition('.')[2]}={mine[key]}" for key in apart)]))
    return labels


def _result(run: TrackedRun, label: str, parameters: int) -> RunResult:
    asked, metrics = _asked(run), run.metrics
    majority = metrics.get("final/majority_accuracy")
    speeds = _speeds(metrics)
    score = TaskResult(run.model, "accuracy", metrics["final/accuracy"], majority=majority)
    return RunResult(
        id=run.id,
        stage=FINAL,
        comparison="runs",
        method=_method(run),
        label=label,
        task=run.model,
        backbone=run.params.get("backbone", "?"),
        seed=int(_number(run.params.get(SEED, "0"))),
        state=FINISHED,
        lr=_number(asked.get("training.lr", "nan")),
        options={
            key.removeprefix("method."): _plain(value) for key, value in asked.items() if key.startswith("method.")
        },
        training={k.removeprefix("training."): _plain(v) for k, v in asked.items() if k.startswith("training.")},
        scores=(score,),
        trainable_parameters=parameters,
        steps=int(metrics.get("final/steps", 0)),
        seconds=metrics.get("final/seconds", 0.0),
        tokens_per_second=speeds.get("tokens_per_second", 0.0),
        answer_tokens_per_second=speeds["answer_tokens_per_second"],
        samples_per_second=speeds.get("samples_per_second", 0.0),
        peak_memory_bytes=int(metrics.get("system/memory_mb", 0.0) * 2**20),
        provenance={"created": utc(run.started)},
    )


def _speeds(metrics: Mapping[str, float]) -> dict[str, float]:
    """Runs that have no speed of answers by its own name counted answers alone under the other."""
    if "train/answer_tokens_per_second" not in metrics:
        return {"answer_tokens_per_second": metrics.get("train/tokens_per_second", 0.0)}
    names = ("tokens_per_second", "answer_tokens_per_second", "samples_per_second")
    return {name: metrics.get(f"train/{name}", 0.0) for name in names}


def _asked(run: TrackedRun) -> dict[str, str]:
    """The parameters that make a run comparable to others."""
    return {
        key: value
        for key, value in run.params.items()
        if key.startswith(KEPT) and key not in (SEED, "method.name") and value != "None"
    }


def _method(run: TrackedRun) -> str:
    return run.params.get("method.name", "?")


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        return float(text)
    return 0.0


def _plain(text: str) -> Any:
    """A parameter as it was before MLflow made it text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
