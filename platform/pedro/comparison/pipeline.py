"""A comparison from spec to report: gather the rows, execute the runs, track them in MLflow, write the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.comparison.data import TaskData, gather
from pedro.comparison.report import ComparisonReport, make_report, write_report
from pedro.comparison.run_executor import RunExecutor, reusable
from pedro.comparison.run_files import METADATA, open_folder, read_comparison, read_named, read_runs
from pedro.comparison.run_planner import RunPlanner, check, far_from_budget
from pedro.comparison.run_tracker import RunTracker
from pedro.comparison.spec import DATA_VARIABLE, ComparisonSpec, data_key
from pedro.data.tasks.sources import HUB
from pedro.errors import DataError
from pedro.provenance import provenance

if TYPE_CHECKING:
    from pedro.comparison.result_model import RunResult
    from pedro.config import Settings

Log = Callable[[str], None]


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison that can start: its runs, and which of them are done."""

    planner: RunPlanner
    data: dict[str, TaskData]
    kept: dict[str, RunResult]


def prepare(spec: ComparisonSpec, settings: Settings, folder: Path, retry_failed: bool, log: Log) -> PreparedComparison:
    """Check methods and backbones, read the tasks' rows, find what is done. Raises PedroError."""
    check(spec)
    read_named(folder, spec.name)
    data = _gather(spec, settings, log)
    planner = RunPlanner(spec, {name: rows.digest for name, rows in data.items()})
    for line in far_from_budget(planner.groups):
        log(line)
    results, broken = read_runs(folder)
    for problem in broken:
        log(f"cannot be read, so it counts as not done: {problem}")
    return PreparedComparison(planner, data, reusable({result.id: result for result in results}, retry_failed))


def _gather(spec: ComparisonSpec, settings: Settings, log: Log) -> dict[str, TaskData]:
    """The rows of every task. Raises one DataError that names all tasks whose rows cannot be had."""
    data, missing = {}, []
    asked = {
        data_key(t, shown): (shown, t) for t in spec.tasks for m in spec.methods for shown in [spec.choice_of(m, t)]
    }
    for key, (choice, plain) in asked.items():
        try:
            data[key] = gather(spec, choice, settings.storage, plain)
        except DataError as error:
            missing.append(error.message)
            if spec.data_of(choice) == HUB:
                break  # a hub that does not answer is asked once
            continue
        tests = ", ".join(f"{len(test.rows):,} of {test.task.name}" for test in data[key].tests)
        log(f"{key}: tested on {tests}")
    if missing:
        head = f"{spec.name}: rows are missing; name their directory in `data:` of the spec or {DATA_VARIABLE}"
        raise DataError("\n  ".join([head, *missing]), param="data")
    return data


def compare(
    spec: ComparisonSpec, settings: Settings, folder: Path, prepared: PreparedComparison, log: Log
) -> ComparisonReport:
    """Run what is missing on the cluster that this process is connected to, and write tables and figures.

    Raises TrainingError for runs that were lost; what was done is kept, and the same call resumes from there.
    """
    before = read_named(folder, spec.name).metadata
    baseline = spec.baseline or spec.labels[0]
    open_folder(folder)

    def write_metadata(changed: bool) -> None:
        """comparison.json, where runs were made or the spec says something else than before."""
        metadata = json.loads(json.dumps(_metadata(spec, baseline, provenance())))
        if changed or any(metadata[key] != before.get(key) for key in metadata.keys() - {"provenance"}):
            _write(folder / METADATA, metadata)

    write_metadata(not before)  # so that a killed comparison's report goes by this spec
    tracker = RunTracker(spec, settings, log)
    executor = RunExecutor(spec, prepared.planner, prepared.data, folder, prepared.kept, tracker.track)
    try:
        executor.run(settings, log)
    finally:
        write_metadata(executor.changed)
        tracker.close()
    report = make_report(read_comparison(folder))
    write_report(report)
    return report


def _metadata(spec: ComparisonSpec, baseline: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """comparison.json."""
    return {
        "schema": 1,
        "name": spec.name,
        "title": spec.title or spec.name,
        "equal": spec.equal,
        "baseline": baseline,
        "labels": spec.labels,
        "spec": json.loads(spec.model_dump_json()),
        "paper": spec.paper,
        "provenance": dict(provenance),
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
