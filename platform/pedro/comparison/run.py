"""A comparison from spec to tables: gather the rows, run the grid, log to MLflow, write the report."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedro.comparison.cells import Planner, check, far_from_budget
from pedro.comparison.data import TaskData, gather
from pedro.comparison.grid import Grid, head_of, usable
from pedro.comparison.results import Cell, Comparison, read_cells, read_comparison
from pedro.comparison.spec import DATA_VARIABLE, ComparisonSpec
from pedro.config import Settings
from pedro.data.tasks.sources import HUB
from pedro.errors import ConfigError, DataError, PedroError
from pedro.provenance import provenance
from pedro.registry import Registry

Say = Callable[[str], None]
HEAD = "comparison.json"


@dataclass(frozen=True)
class Prepared:
    """A comparison that can start: its runs, and which of them are done."""

    planner: Planner
    data: dict[str, TaskData]
    kept: dict[str, Cell]


def folder_of(spec: ComparisonSpec, settings: Settings, out: Path | None) -> Path:
    """Where the comparison's results are."""
    return out.absolute() if out else settings.home / "comparisons" / spec.name


def prepare(spec: ComparisonSpec, settings: Settings, folder: Path, retry_failed: bool, say: Say) -> Prepared:
    """Check methods and backbones, read the tasks' rows, find what is done. Raises PedroError."""
    check(spec)
    read(folder, spec)
    data = _gather(spec, settings, say)
    planner = Planner(spec, {name: rows.digest for name, rows in data.items()})
    for line in far_from_budget(spec, planner.groups):
        say(line)
    cells, broken = read_cells(folder)
    for problem in broken:
        say(f"cannot be read, so it counts as not done: {problem}")
    return Prepared(planner, data, usable({cell.id: cell for cell in cells}, retry_failed))


def _gather(spec: ComparisonSpec, settings: Settings, say: Say) -> dict[str, TaskData]:
    """The rows of every task. Raises one DataError that names all tasks whose rows cannot be had."""
    data, missing = {}, []
    for choice in spec.tasks:
        try:
            data[choice.task] = gather(spec, choice, settings.storage)
        except DataError as error:
            missing.append(error.message)
            if spec.data_of(choice) == HUB:
                break  # a hub that does not answer is asked once
            continue
        tests = ", ".join(f"{len(test.rows):,} of {test.task.name}" for test in data[choice.task].tests)
        say(f"{choice.task}: tested on {tests}")
    if missing:
        head = f"{spec.name}: rows are missing; name their directory in `data:` of the spec or {DATA_VARIABLE}"
        raise DataError("\n  ".join([head, *missing]), param="data")
    return data


def compare(spec: ComparisonSpec, settings: Settings, folder: Path, prepared: Prepared, say: Say) -> Comparison:
    """Run what is missing on the cluster that this process is connected to, and write tables and figures.

    Raises TrainingError for runs that were lost; what was done is kept, and the same call goes on from there.
    """
    started = time.monotonic()
    before = read(folder, spec).head
    baseline = spec.baseline or spec.labels[0]
    open_folder(folder)

    def write_head(changed: bool) -> None:
        """comparison.json, where runs were made or the spec says something else than before."""
        seconds = float(before.get("seconds") or 0.0) + time.monotonic() - started
        head = json.loads(json.dumps(head_of(spec, seconds, baseline, provenance())))
        if changed or any(head[key] != before.get(key) for key in head.keys() - {"seconds", "provenance"}):
            _write(folder / HEAD, head)

    if not before:
        write_head(True)
    log = _Log(spec, settings, say)
    grid = Grid(spec, prepared.planner, prepared.data, folder, prepared.kept, log.cell)
    try:
        grid.run(settings, say)
    finally:
        write_head(grid.changed)
        log.close()
    from pedro.comparison.report import write_report

    comparison = read_comparison(folder)
    write_report(comparison)
    return comparison


class _Log:
    """The runs in MLflow: one for the comparison, one below it for each of its runs."""

    def __init__(self, spec: ComparisonSpec, settings: Settings, say: Say) -> None:
        self._spec, self._say = spec, say
        self._experiment = f"comparison.{spec.name}"
        self._registry: Registry | None = Registry.open(settings)
        self._parent: str | None = None

    def cell(self, cell: Cell) -> None:
        """Log a run that ended. A tracking server that fails costs the log, not the comparison."""
        if self._registry is None:
            return
        try:
            self._write(self._registry, cell)
        except PedroError as error:
            self._say(f"runs are not logged to MLflow any more: {error.message}")
            self._registry = None

    def close(self) -> None:
        """End the comparison's own run."""
        if self._registry is not None and self._parent is not None:
            self._registry.finish_run(self._parent)

    def _write(self, registry: Registry, cell: Cell) -> None:
        tags = {"comparison": self._spec.name}
        if self._parent is None:
            self._parent = registry.start_run(experiment=self._experiment, name=self._spec.name, params={}, tags=tags)
        params = {
            "method": cell.method,
            "label": cell.label,
            **{f"method.{key}": value for key, value in cell.options.items()},
            "task": cell.task,
            "backbone": cell.backbone,
            "budget": cell.budget,
            "seed": cell.seed,
            "lr": cell.lr,
            "stage": cell.stage,
        }
        name = f"{cell.label}-{cell.task}-{cell.seed}"
        mine = {**tags, "cell": cell.id, "message": cell.message}
        run = registry.start_run(experiment=self._experiment, name=name, params=params, tags=mine, parent=self._parent)
        for step, value in cell.curves.get("dev/loss", []):
            registry.log_metrics(run, int(step), {"dev/loss": value})
        if cell.state == "finished":
            numbers = {f"test/{score.task}": score.value for score in cell.scores}
            numbers |= {"trainable_parameters": cell.trainable_parameters}
            if cell.validation.get("value") is not None:
                numbers |= {"validation": cell.validation["value"]}
            numbers |= {"seconds": cell.seconds, "tokens_per_second": cell.tokens_per_second}
            registry.log_metrics(run, cell.steps, numbers)
        registry.finish_run(run, "FINISHED" if cell.state == "finished" else "FAILED")


def read(folder: Path, spec: ComparisonSpec) -> Comparison:
    """What is in the folder. Raises ConfigError for another comparison's, or one that cannot be told."""
    found = read_comparison(folder)
    if (folder / HEAD).exists() and not found.head:
        why = "; ".join(found.problems) or "it is empty"
        raise ConfigError(
            f"--out: {folder / HEAD} cannot be read ({why}); delete that file: the runs beside it are kept",
            param="--out",
        )
    if found.head and found.name != spec.name:
        raise ConfigError(
            f"--out: {folder} holds the comparison {found.name!r}, not {spec.name!r}; name another folder",
            param="--out",
        )
    return found


def open_folder(folder: Path) -> None:
    """Make the folder of the results. Raises ConfigError where nothing can be written, before anything is started."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(
            f"--out: {folder} cannot be written ({reason}); name another folder", param="--out"
        ) from error


def _write(path: Path, tree: dict[str, Any]) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    shutil.move(scratch, path)
