"""Runs a comparison on Ray: a few warm workers, one run after the other on each, every finished run kept at once.

Killed at any point, the same call resumes with what is missing: a run is known by what its result depends on.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heappop, heappush
from itertools import count as counting
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbones.sharing import obtain_backbone, offer_backbone
from pedro.comparison.kept_rows import write_rows
from pedro.comparison.rate_search import Chosen, chosen, next_rate
from pedro.comparison.result_model import FAILED, FINAL, TUNE, RunResult, format_score
from pedro.comparison.run_files import write_run
from pedro.config import Settings
from pedro.errors import ConfigError, TrainingError
from pedro.training.progress import clock
from pedro.training.trainer import ENVIRONMENT

if TYPE_CHECKING:
    from pedro.comparison.data import TaskData
    from pedro.comparison.kept_rows import AnsweredTask
    from pedro.comparison.run_planner import PlannedRun, RunGroup, RunPlanner
    from pedro.comparison.spec import ComparisonSpec

Log = Callable[[str], None]
TRIES = 3  # of a run whose worker died (out of memory, a lost node)


class RunWorker:
    """A process that keeps torch, the backbone's rows and the compiled parts of PEFT warm between runs."""

    def __init__(self, settings: Mapping[str, str], threads: int) -> None:
        os.environ.update({name: value for name, value in ENVIRONMENT.items() if not name.startswith("RAY_")})
        import logging

        import torch

        from pedro.backbone import quiet

        quiet()
        logging.getLogger("pedro").setLevel(logging.ERROR)  # rows that do not fit are counted in the result
        torch.set_num_threads(threads)
        self._settings = Settings.from_env(settings)

    def run(self, plan: PlannedRun, data: TaskData, spec: ComparisonSpec) -> tuple[dict[str, Any], list[AnsweredTask]]:
        """One run's result as JSON, and the rows behind it. Whatever breaks is a failed run: the others continue."""
        import traceback

        from pedro.comparison.single_run import execute_run, failed

        try:
            obtain_backbone(self._settings, plan.group.backbone)
            rows: list[AnsweredTask] = []
            made = execute_run(plan, data, spec.resources, spec.judge, self._settings.cache, rows.append)
            return made.to_dict(), rows
        except Exception as error:  # noqa: BLE001 - one run of hundreds; its trace goes to the worker's log
            traceback.print_exc()
            return failed(plan, f"broke: {type(error).__name__}: {' '.join(str(error).split())[:500]}").to_dict(), []


@dataclass
class ProgressReporter:
    """What is done, and how long the rest will take."""

    kept: set[str]
    """Runs of this comparison that were done before; more of them are found as learning rates are chosen."""
    log: Log
    done: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    def ended(self, plan: PlannedRun, result: RunResult, total: int) -> None:
        """One line for a run that ended, of as many as are known to be wanted."""
        self.done += 1
        self.failed += result.state == FAILED
        spent = time.monotonic() - self.started
        left = (total - len(self.kept) - self.done) * spent / self.done
        if result.state == FAILED:
            what = f"failed: {result.message}"
        else:
            scores = ", ".join(format_score(score.value, score.metric) for score in result.scores)
            spent_on_it = result.seconds or result.scoring_seconds  # the bare backbone does not train
            what = f"validation {_validation(result)} · test {scores or '-'} · {spent_on_it:.0f} s"
        count = f"[{len(self.kept) + self.done}/{total}]"
        self.log(f"{count} {plan} · {what} · {clock(left)} left")


class RunExecutor:
    """Executes the runs of one comparison and keeps them in its folder. `data` are the tasks' rows by `data_key`.

    Of what can start, that which the spec names first does, so that its tables fill task by task.
    """

    def __init__(
        self,
        spec: ComparisonSpec,
        planner: RunPlanner,
        data: Mapping[str, TaskData],
        folder: Path,
        kept: Mapping[str, RunResult],
        on_result: Callable[[RunResult], None] = lambda _result: None,
    ) -> None:
        self.spec, self.planner, self.data, self.folder = spec, planner, data, folder
        self.total = planner.count()
        """Of runs, done or not; more where a search goes on beyond the values of the spec."""
        self.results = dict(kept)
        self.changed = False
        """Whether any run was made."""
        self._on_result = on_result
        self._shown: set[str] = set()
        self._queue: list[tuple[int, int, PlannedRun]] = []
        """A heap: the group's place in the spec, then when it was queued."""
        self._places = {group: place for place, group in enumerate(planner.groups)}
        self._queued = counting()
        self._seen: set[str] = set()
        self._kept: set[str] = set()
        self._waits: dict[RunGroup, list[PlannedRun]] = {}
        self._decided: set[RunGroup] = set()

    def run(self, settings: Settings, log: Log) -> None:
        """Run everything that is missing. Raises TrainingError if runs were lost with their workers."""
        self._begin()
        for backbone in self.spec.backbones if self._queue else ():
            offer_backbone(settings, backbone, log)
        lost = self._drain(settings, log, ProgressReporter(self._kept, log)) if self._queue else []
        if lost:
            raise TrainingError(
                f"{self.spec.name}: {len(lost)} runs were lost with their workers {TRIES} times, first {lost[0]}; "
                "give them more memory (resources, concurrency) and run the same command again: the others are kept"
            )
        self.settle()

    def settle(self) -> None:
        """Take the final runs of an earlier version of the spec out of the tables."""
        for result in list(self.results.values()):
            if result.stage == FINAL and result.id not in self._shown:
                self._keep(replace(result, stage=TUNE))

    def _drain(self, settings: Settings, log: Log, progress: ProgressReporter) -> list[str]:
        """Keep every worker busy until nothing is queued; the runs that were lost with their workers."""
        import ray

        if missing := missing_resources(self.spec, ray.nodes()):
            if settings.ray_address is None:
                raise ConfigError(
                    f"{missing}; ask for less, or set RAY_ADDRESS to a cluster that has it", param="resources"
                )
            log(f"{missing}; waiting for one that has it (ask for less if none will come)")
        count = min(self.spec.concurrency or capacity(self.spec), len(self._queue))
        log(f"{self.total} runs, {len(progress.kept)} of them done before; {count} at a time")
        needs = {"num_cpus": self.spec.resources.cpus, "num_gpus": self.spec.resources.gpus}
        kind: Any = ray.remote(**needs)(RunWorker)  # type: ignore[call-overload]
        new_worker = partial(kind.remote, settings.env_of_workers(), max(1, int(self.spec.resources.cpus)))
        shared, spec = {name: ray.put(item) for name, item in self.data.items()}, ray.put(self.spec)
        idle = [new_worker() for _ in range(count)]
        running: dict[Any, tuple[Any, PlannedRun]] = {}
        tries: Counter[str] = Counter()
        lost = []
        while running or self._queue:
            while idle and self._queue:
                worker, plan = idle.pop(), self._take()
                running[worker.run.remote(plan, shared[plan.data_key], spec)] = (worker, plan)
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            worker, plan = running.pop(ended)
            try:
                values, rows = ray.get(ended)
                result = RunResult.from_dict(values)
            except ray.exceptions.RayError as error:
                idle.append(new_worker())
                tries[plan.id] += 1
                log(f"{plan}: its worker died ({type(error).__name__}), attempt {tries[plan.id]} of {TRIES}")
                if tries[plan.id] < TRIES:
                    self._push(plan, len(self._places))  # after all others
                else:
                    lost.append(str(plan))
                continue
            idle.append(worker)
            write_rows(self.folder, plan.id, rows)
            self._ended(plan, result)
            progress.ended(plan, result, self.total)
        for worker in idle:
            ray.kill(worker)
        return lost

    def _begin(self) -> None:
        """Queue what can start: searches, since final runs wait for them, and what has no rate to search."""
        for group in self.planner.groups:
            searches = self.planner.tuning(group)
            if searches:
                self._waits[group] = searches
                for plan in searches:
                    self._enqueue(plan)
        for group in list(self._waits):
            self._decide(group)
        for group in self.planner.groups:
            if self.spec.tune is None or group.untrained:
                self._finish(group, None)

    def _enqueue(self, plan: PlannedRun) -> None:
        """Queue a run unless it is done or queued; what is done takes this plan's label and stage."""
        if plan.stage == FINAL:
            self._shown.add(plan.id)
        done = self.results.get(plan.id)
        if done is not None:
            if plan.id not in self._seen:
                self._kept.add(plan.id)
            stage = FINAL if plan.id in self._shown else plan.stage
            searched = plan.searched or done.searched
            mine = replace(done, stage=stage, label=plan.group.label, comparison=plan.comparison, searched=searched)
            if mine != done:
                self._keep(mine)
        elif plan.id not in self._seen:
            self._seen.add(plan.id)
            self._push(plan, self._places[plan.group])

    def _push(self, plan: PlannedRun, place: int) -> None:
        heappush(self._queue, (place, next(self._queued), plan))

    def _take(self) -> PlannedRun:
        return heappop(self._queue)[-1]

    def _ended(self, plan: PlannedRun, result: RunResult) -> None:
        self.changed = True
        self._keep(result)
        self._on_result(result)
        if plan.group in self._waits:
            self._decide(plan.group)

    def _keep(self, result: RunResult) -> None:
        self.results[result.id] = result
        write_run(self.folder, result)

    def _decide(self, group: RunGroup) -> None:
        """Once a group's search is over, final runs can start: its own and those that take its learning rate.

        A search whose best value lies at an edge goes on beyond it, as far as the spec allows.
        """
        trials, tune = self._waits[group], self.spec.tune
        assert tune is not None, "only what is searched waits"
        while group not in self._decided and all(plan.id in self.results for plan in trials):
            runs = [self.results[plan.id] for plan in trials]
            following = next_rate(runs, tune)
            if following is not None:
                self.total += 1
                trials.append(self.planner.trial(group, following))
                self._enqueue(trials[-1])
                continue
            self._decided.add(group)
            found = chosen(runs, tune)
            for other in self.planner.groups:
                if self.planner.lr_source(other) == group:
                    self._finish(other, found)

    def _finish(self, group: RunGroup, found: Chosen | None) -> None:
        lr, searched = (found.lr, found.searched) if found else (None, None)
        for plan in self.planner.finals(group, lr, searched):
            self._enqueue(plan)


def capacity(spec: ComparisonSpec) -> int:
    """How many runs fit on the cluster at a time."""
    import ray

    available: dict[str, float] = ray.cluster_resources()
    needs = {"CPU": spec.resources.cpus, "GPU": spec.resources.gpus}
    return max(1, min(math.floor(available.get(name, 0) / need) for name, need in needs.items() if need))


def missing_resources(spec: ComparisonSpec, nodes: Iterable[Mapping[str, Any]]) -> str:
    """What a run needs and no node of the cluster has, with its field and value; empty where it can start."""
    wants = {"CPU": ("cpus", spec.resources.cpus), "GPU": ("gpus", spec.resources.gpus)}
    nodes_resources = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(node.get(kind, 0) >= amount for kind, (_, amount) in wants.items()) for node in nodes_resources):
        return ""
    asked = ", ".join(f"resources.{name}: {amount:g}" for name, amount in wants.values() if amount)
    most = ", ".join(f"{max((node.get(kind, 0) for node in nodes_resources), default=0):g} {kind}" for kind in wants)
    return f"{asked}: no node has so much (the largest: {most})"


def reusable(results: Mapping[str, RunResult], retry_failed: bool) -> dict[str, RunResult]:
    """The kept runs that are not done again."""
    return {name: result for name, result in results.items() if not (retry_failed and result.state == FAILED)}


def _validation(result: RunResult) -> str:
    value, metric = result.validation.get("value"), str(result.validation.get("metric"))
    if value is None:
        return "-"
    return f"loss {-value:.3f}" if metric == "loss" else format_score(value, metric)
