"""From a spec to its runs: which there are, what each is called, which learning rate a search chose.

A run's id is a hash of everything that its result depends on, so that a comparison which was killed or changed only
does what is missing. Trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from pedro.backbone import load_config, resolve_backbone
from pedro.comparison.result_model import BUDGET_TOLERANCE, FINAL, FINISHED, TUNE, RunResult
from pedro.comparison.spec import SIZES, ComparisonSpec, MethodChoice, TaskChoice, label_of
from pedro.data.tasks import TASKS
from pedro.errors import BackboneError, ConfigError


@dataclass(frozen=True)
class RunGroup:
    """The runs that share a learning rate: a method at a budget, on a task and a backbone."""

    method: str
    label: str
    options: tuple[tuple[str, Any], ...] = field(hash=False)  # values may be mappings
    task: str
    backbone: str
    budget: int | None


@dataclass(frozen=True)
class PlannedRun:
    """One run."""

    id: str
    stage: str
    comparison: str
    group: RunGroup
    wording: str
    seed: int
    training: dict[str, Any]
    num_beams: int
    eval_batch_size: int
    theta: float

    @property
    def lr(self) -> float:
        lr: float = self.training["lr"]
        return lr

    @property
    def options(self) -> dict[str, Any]:
        """The method's."""
        options: dict[str, Any] = json.loads(json.dumps(dict(self.group.options)))
        return options

    def __str__(self) -> str:
        budget = f" at {self.group.budget:,}" if self.group.budget else ""
        return f"{self.group.label}{budget} · {self.group.task} · lr {self.lr:g} · seed {self.seed}"


class RunPlanner:
    """Lists the runs of a spec. `digests` are those of the tasks' data."""

    def __init__(self, spec: ComparisonSpec, digests: dict[str, str]) -> None:
        self.spec, self._digests = spec, digests
        self._methods = {label_of(method): method for method in spec.methods}
        self.groups = list(self._groups())

    def tuning(self, group: RunGroup) -> list[PlannedRun]:
        """The runs that choose the group's learning rate; none where it is given or taken from another group."""
        if self.spec.tune is None or self.lr_source(group) != group:
            return []
        return [self._plan(group, TUNE, lr, self.spec.tune.seed) for lr in self.spec.tune.lr]

    def lr_source(self, group: RunGroup) -> RunGroup:
        """The group whose learning rate this one takes; mostly itself."""
        task = self.spec.task(group.task).tune_like or group.task
        once = self.spec.tune is not None and self.spec.tune.once and bool(self.spec.budgets)
        like = [
            other
            for other in self.groups
            if (other.label, other.task, other.backbone) == (group.label, task, group.backbone)
            and (once or other.budget == group.budget)
        ]
        return like[len(like) // 2]

    def finals(self, group: RunGroup, lr: float | None) -> list[PlannedRun]:
        """The runs that tables show."""
        return [self._plan(group, FINAL, lr, seed) for seed in self.spec.seeds]

    def count(self) -> int:
        """How many runs there are, those counted once that serve both ends."""
        tune = self.spec.tune
        tunes = len(tune.lr) * sum(self.lr_source(group) == group for group in self.groups) if tune else 0
        shared = sum(self.lr_source(group) == group for group in self.groups) if tune and self._shared else 0
        return tunes + len(self.groups) * len(self.spec.seeds) - shared

    @property
    def _shared(self) -> bool:
        return self.spec.tune is not None and self.spec.tune.seed in self.spec.seeds

    def _groups(self) -> Iterator[RunGroup]:
        for backbone in self.spec.backbones:
            for task in self.spec.tasks:
                for method in self.spec.methods:
                    for budget, options in self._sizes(method, backbone):
                        pairs = tuple(sorted((key, _frozen(value)) for key, value in options.items()))
                        yield RunGroup(method.name, label_of(method), pairs, task.task, backbone, budget)

    def _sizes(self, method: MethodChoice, backbone: str) -> Iterator[tuple[int | None, dict[str, Any]]]:
        if not self.spec.budgets:
            yield None, method.options
            return
        for budget in self.spec.budgets:
            yield budget, sized(method, backbone, budget)

    def _plan(self, group: RunGroup, stage: str, lr: float | None, seed: int) -> PlannedRun:
        task = self.spec.task(group.task)
        training = self.spec.training_of(self._method(group), task, lr, seed).model_dump(mode="json")
        depends = {
            **asdict(group),
            "label": None,
            "wording": task.wording,
            "training": training,
            "num_beams": self.spec.num_beams,
            "theta": self.spec.theta,
            "data": self._digests[group.task],
            "backbone_digest": resolve_backbone(group.backbone).digest,
            **self._judge(task),
        }
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        return PlannedRun(
            digest,
            stage,
            self.spec.name,
            group,
            task.wording,
            seed,
            training,
            self.spec.num_beams,
            self.spec.eval_batch_size,
            self.spec.theta,
        )

    def _judge(self, task: TaskChoice) -> dict[str, Any]:
        """Who marks the answers, where somebody does."""
        marked = self.spec.judge and any(TASKS[other.task].metric == "judge" for other in task.evaluations)
        return {"judge": self.spec.judge.model} if self.spec.judge and marked else {}

    def _method(self, group: RunGroup) -> MethodChoice:
        return self._methods[group.label]


def choose(runs: Sequence[RunResult]) -> float | None:
    """The learning rate whose run has the best score on validation, then the least loss; None if every run failed."""
    ended = [run for run in runs if run.state == FINISHED]
    if not ended:
        return None

    def worth(run: RunResult) -> tuple[float, float]:
        value, loss = run.validation.get("value"), run.validation.get("loss")  # null where it was NaN
        return (-math.inf if value is None else value, -math.inf if loss is None else -loss)

    return max(ended, key=worth).lr


def check(spec: ComparisonSpec) -> None:
    """Raise one ConfigError with all that is wrong with methods and backbones, before anything starts."""
    mistakes: dict[str, None] = {}
    for backbone in spec.backbones:
        try:
            resolve_backbone(backbone)
        except BackboneError as error:
            mistakes[error.message] = None
            continue
        for method in spec.methods:
            for budget in spec.budgets or (None,):
                try:
                    options = sized(method, backbone, budget) if budget else method.options
                    count_parameters_of(method.name, _key(options), backbone)
                except (BackboneError, ConfigError) as error:
                    mistakes[f"{label_of(method)}: {error.message}"] = None
    if mistakes:
        head = f"{spec.name}: {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
        raise ConfigError("\n  ".join([head, *mistakes]), param="methods")


def sized(method: MethodChoice, backbone: str, budget: int) -> dict[str, Any]:
    """The method's options with its size set so that its trained parameters come nearest to `budget`.

    A method without a size (full, RED) keeps its options. Raises ConfigError for options that do not fit.
    """
    from pedro.methods.registry import get_method

    known = get_method(method.name).known(method.options)
    size = next((name for name in SIZES if name in known), None)
    if size is None:
        return method.options
    if size in method.options:
        raise ConfigError(f"method.{size}: `budgets` sets it; leave it out", param=f"method.{size}")

    def count(value: int) -> int:
        return count_parameters_of(method.name, _key({**method.options, size: value}), backbone)

    one, two = count(1), count(2)
    if two == one:
        return {**method.options, size: 1}
    guess = max(1, 1 + round((budget - one) / (two - one)))
    near = range(max(1, guess - 1), guess + 2)
    return {**method.options, size: min(near, key=lambda value: (abs(count(value) - budget), value))}


@cache
def count_parameters_of(method: str, options: str, backbone: str) -> int:
    """Trained parameters of a method on a backbone's shapes, on the meta device; `options` as JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    from pedro.backbone import quiet
    from pedro.methods.registry import count_parameters, get_method

    quiet()
    config = load_config(resolve_backbone(backbone))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_method(method).apply(model.requires_grad_(False), json.loads(options))
    return count_parameters(adapted)["trainable"]


def far_from_budget(groups: Iterable[RunGroup]) -> list[str]:
    """A line for each method that cannot come near a budget, as its table will say."""
    lines: dict[str, None] = {}
    for group in groups:
        if group.budget is not None:
            count = count_parameters_of(group.method, _key(dict(group.options)), group.backbone)
            if abs(count - group.budget) > BUDGET_TOLERANCE * group.budget:
                lines[f"budget {group.budget:,} on {group.backbone}: {group.label} has {count:,} at the nearest"] = None
    return list(lines)


def _key(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
