"""Runs a comparison on Ray: a few warm workers, one run after the other on each, every finished run kept at once.

Killed at any point, the same call does what is missing: a run is known by what its result depends on. Knows nothing
of tables or of MLflow.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pedro.comparison.cells import Group, Plan, Planner, choose
from pedro.comparison.data import TaskData
from pedro.comparison.results import FAILED, FINAL, TUNE, Cell, write_cell
from pedro.comparison.sheets import number
from pedro.comparison.spec import ComparisonSpec
from pedro.config import Settings
from pedro.errors import ConfigError, TrainingError
from pedro.training.trainer import ENVIRONMENT, pack_settings, unpack_settings

Say = Callable[[str], None]
TRIES = 3  # a run whose worker died (out of memory, a lost node) is tried so often


class Worker:
    """A process that keeps torch, the backbone's rows and the compiled parts of PEFT warm between runs."""

    def __init__(self, settings: Mapping[str, Any], threads: int) -> None:
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")})
        import logging

        import torch

        from pedro.backbone import quiet

        quiet()
        logging.getLogger("pedro").setLevel(logging.ERROR)  # rows that do not fit are counted in the cell
        torch.set_num_threads(threads)
        self._settings = unpack_settings(dict(settings))

    def run(self, plan: Plan, data: TaskData, spec: ComparisonSpec) -> dict[str, Any]:
        """One run, as a cell's JSON. Whatever breaks is a failed cell: the grid goes on."""
        import traceback

        from pedro.comparison.cell import failed, run_cell

        try:
            return run_cell(plan, data, spec.resources, spec.judge, self._settings.cache).to_dict()
        except Exception as error:  # noqa: BLE001 - one run of hundreds; its trace goes to the worker's log
            traceback.print_exc()
            return failed(plan, f"broke: {type(error).__name__}: {' '.join(str(error).split())[:500]}").to_dict()


@dataclass
class Progress:
    """What is done, and how long the rest will take."""

    total: int
    kept: set[str]
    """Runs of this comparison that were done before; more of them are found as learning rates are chosen."""
    say: Say
    done: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    def ended(self, plan: Plan, cell: Cell) -> None:
        """One line for a run that ended."""
        self.done += 1
        self.failed += cell.state == FAILED
        spent = time.monotonic() - self.started
        left = max(0, self.total - len(self.kept) - self.done) * spent / self.done
        if cell.state == FAILED:
            what = f"failed: {cell.message}"
        else:
            scores = ", ".join(number(score.value, score.metric) for score in cell.scores)
            what = f"validation {_validation(cell)} · test {scores or '-'} · {cell.seconds:.0f} s"
        place = f"[{len(self.kept) + self.done}/{self.total}]"
        self.say(f"{place} {plan} · {what} · {_clock(left)} left")


class Grid:
    """The runs of one comparison in a folder. `data` are the tasks' rows by name."""

    def __init__(
        self,
        spec: ComparisonSpec,
        planner: Planner,
        data: Mapping[str, TaskData],
        folder: Path,
        kept: Mapping[str, Cell],
        on_cell: Callable[[Cell], None] = lambda cell: None,
    ) -> None:
        self.spec, self.planner, self.data, self.folder = spec, planner, data, folder
        self.cells = dict(kept)
        self.changed = False
        """Whether any run was made."""
        self._on_cell = on_cell
        self._shown: set[str] = set()
        self._queue: deque[Plan] = deque()
        self._seen: set[str] = set()
        self._kept: set[str] = set()
        self._waits: dict[Group, list[Plan]] = {}
        self._decided: set[Group] = set()

    def run(self, settings: Settings, say: Say) -> None:
        """Run everything that is missing. Raises TrainingError if runs were lost with their workers."""
        self._begin()
        lost = self._drain(settings, say, Progress(self.planner.count(), self._kept, say)) if self._queue else []
        if lost:
            raise TrainingError(
                f"{self.spec.name}: {len(lost)} runs were lost with their workers {TRIES} times, first {lost[0]}; "
                "give them more memory (resources, concurrency) and run the same command again: the others are kept"
            )
        self.settle()

    def settle(self) -> None:
        """Let tables forget the final runs of an earlier wording of the spec."""
        for cell in list(self.cells.values()):
            if cell.stage == FINAL and cell.id not in self._shown:
                self._keep(replace(cell, stage=TUNE))

    def _drain(self, settings: Settings, say: Say, progress: Progress) -> list[str]:
        """Keep every worker busy until nothing is queued; the runs that were lost with their workers."""
        import ray

        if lack := lacking(self.spec, ray.nodes()):
            if settings.ray_address is None:
                raise ConfigError(
                    f"{lack}; ask for less, or set RAY_ADDRESS to a cluster that has it", param="resources"
                )
            say(f"{lack}; waiting for one that has it (ask for less if none will come)")
        count = min(self.spec.concurrency or capacity(self.spec), len(self._queue))
        say(f"{progress.total} runs, {len(progress.kept)} of them done before; {count} at a time")
        needs = {"num_cpus": self.spec.resources.cpus, "num_gpus": self.spec.resources.gpus}
        kind: Any = ray.remote(**needs)(Worker)  # type: ignore[call-overload]
        hire = partial(kind.remote, pack_settings(settings), max(1, int(self.spec.resources.cpus)))
        shared, spec = {name: ray.put(item) for name, item in self.data.items()}, ray.put(self.spec)
        idle = [hire() for _ in range(count)]
        running: dict[Any, tuple[Any, Plan]] = {}
        tries: Counter[str] = Counter()
        lost = []
        while running or self._queue:
            while idle and self._queue:
                worker, plan = idle.pop(), self._queue.popleft()
                running[worker.run.remote(plan, shared[plan.group.task], spec)] = (worker, plan)
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            worker, plan = running.pop(ended)
            try:
                cell = Cell.from_dict(ray.get(ended))
            except ray.exceptions.RayError as error:
                idle.append(hire())
                tries[plan.id] += 1
                say(f"{plan}: its worker died ({type(error).__name__}), for the {tries[plan.id]}. time")
                if tries[plan.id] < TRIES:
                    self._queue.append(plan)
                else:
                    lost.append(str(plan))
                continue
            idle.append(worker)
            self._ended(plan, cell)
            progress.ended(plan, cell)
        for worker in idle:
            ray.kill(worker)
        return lost

    def _begin(self) -> None:
        """Queue what can start: searches first, since final runs wait for them."""
        for group in self.planner.groups:
            searches = self.planner.tuning(group)
            if searches:
                self._waits[group] = searches
                for plan in searches:
                    self._want(plan)
        for group in list(self._waits):
            self._decide(group)
        if self.spec.tune is None:
            for group in self.planner.groups:
                self._finish(group, None)

    def _want(self, plan: Plan) -> None:
        """Queue a run unless it is done or queued; what is done is shown as this plan calls it."""
        if plan.stage == FINAL:
            self._shown.add(plan.id)
        done = self.cells.get(plan.id)
        if done is not None:
            if plan.id not in self._seen:
                self._kept.add(plan.id)
            stage = FINAL if plan.id in self._shown else plan.stage
            mine = replace(done, stage=stage, label=plan.group.label, comparison=plan.comparison)
            if mine != done:
                self._keep(mine)
        elif plan.id not in self._seen:
            self._seen.add(plan.id)
            self._queue.append(plan)

    def _ended(self, plan: Plan, cell: Cell) -> None:
        self.changed = True
        self._keep(cell)
        self._on_cell(cell)
        if plan.group in self._waits:
            self._decide(plan.group)

    def _keep(self, cell: Cell) -> None:
        self.cells[cell.id] = cell
        write_cell(self.folder, cell)

    def _decide(self, group: Group) -> None:
        """Once a group's search is over, its final runs and those of the groups that learn from it can start."""
        searches = self._waits[group]
        if group in self._decided or not all(plan.id in self.cells for plan in searches):
            return
        self._decided.add(group)
        lr = choose([self.cells[plan.id] for plan in searches])
        chosen = searches[0].lr if lr is None else lr  # all diverged: the final runs will say so
        for other in self.planner.groups:
            if self.planner.teacher(other) == group:
                self._finish(other, chosen)

    def _finish(self, group: Group, lr: float | None) -> None:
        for plan in self.planner.finals(group, lr):
            self._want(plan)


def capacity(spec: ComparisonSpec) -> int:
    """How many runs fit on the cluster at a time."""
    import ray

    there, needs = ray.cluster_resources(), {"CPU": spec.resources.cpus, "GPU": spec.resources.gpus}
    return max(1, min(math.floor(there.get(name, 0) / need) for name, need in needs.items() if need))


def lacking(spec: ComparisonSpec, nodes: Iterable[Mapping[str, Any]]) -> str:
    """What a run wants and no node of the cluster has, with its field and value; nothing where it can start."""
    wants = {"CPU": ("cpus", spec.resources.cpus), "GPU": ("gpus", spec.resources.gpus)}
    there = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(node.get(kind, 0) >= amount for kind, (_, amount) in wants.items()) for node in there):
        return ""
    asked = ", ".join(f"resources.{name}: {amount:g}" for name, amount in wants.values() if amount)
    most = ", ".join(f"{max((node.get(kind, 0) for node in there), default=0):g} {kind}" for kind in wants)
    return f"{asked}: no node has so much (the largest: {most})"


def usable(cells: Mapping[str, Cell], retry_failed: bool) -> dict[str, Cell]:
    """The kept runs that are not done again."""
    return {name: cell for name, cell in cells.items() if not (retry_failed and cell.state == FAILED)}


def _validation(cell: Cell) -> str:
    value, metric = cell.validation.get("value"), str(cell.validation.get("metric"))
    if value is None:
        return "-"
    return f"loss {-value:.3f}" if metric == "loss" else number(value, metric)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def head_of(spec: ComparisonSpec, seconds: float, baseline: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
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
        "seconds": round(seconds, 1),
        "provenance": dict(provenance),
    }
