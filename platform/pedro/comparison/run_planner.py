"""From a spec to its runs: which there are, and what each is called.

A run's id is a hash of everything that its result depends on, so that a comparison which was killed or changed only
does what is missing. Trains nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from pedro.backbone import load_config, resolve_backbone
from pedro.comparison.data import has_chat_template
from pedro.comparison.result_model import BACKBONE, BUDGET_TOLERANCE, FINAL, TUNE, RunResult
from pedro.comparison.spec import SIZES, ComparisonSpec, MethodChoice, TaskChoice, data_key, label_of
from pedro.comparison.untrained import Untrained
from pedro.data.general_text import text_digest
from pedro.data.tasks import TASKS, get_task
from pedro.errors import BackboneError, ConfigError
from pedro.training.spec import TrainingSpec

if TYPE_CHECKING:
    from pedro.comparison.spec_sections import ForgettingSpec, ServingSpec


@dataclass(frozen=True)
class RunGroup:
    """The runs that share a learning rate: a method at a budget, on a task and a backbone."""

    method: str
    label: str
    options: tuple[tuple[str, Any], ...] = field(hash=False)  # values may be mappings
    task: str
    backbone: str
    budget: int | None

    @property
    def untrained(self) -> Untrained | None:
        """How the backbone is asked, where this is the backbone itself."""
        return Untrained.of(dict(self.options)) if self.method == BACKBONE else None


@dataclass(frozen=True)
class PlannedRun:
    """One run. `chat`: its rows are conversations in the backbone's own chat template."""

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
    chat: bool = False
    data_key: str = ""
    """Which rows it is trained and scored on (`spec.data_key`)."""
    searched: dict[str, Any] = field(default_factory=dict)
    """How its learning rate was found (`rate_search.Chosen`); no part of its id."""
    forgetting: ForgettingSpec | None = None
    serving: ServingSpec | None = None

    @property
    def lr(self) -> float:
        """NaN where nothing is trained."""
        lr: float = self.training.get("lr", math.nan)
        return lr

    @property
    def options(self) -> dict[str, Any]:
        """The method's."""
        options: dict[str, Any] = json.loads(json.dumps(dict(self.group.options)))
        return options

    def __str__(self) -> str:
        budget = f" at {self.group.budget:,}" if self.group.budget else ""
        rate = f" · lr {self.lr:g}" if "lr" in self.training else ""
        return f"{self.group.label}{budget} · {self.group.task}{rate} · seed {self.seed}"


class RunPlanner:
    """Lists the runs of a spec. `digests` are those of the tasks' rows, by `data_key`."""

    def __init__(self, spec: ComparisonSpec, digests: dict[str, str]) -> None:
        self.spec, self._digests = spec, digests
        self._methods = {label_of(method): method for method in spec.methods}
        self.groups = list(self._groups())

    def tuning(self, group: RunGroup) -> list[PlannedRun]:
        """The runs that choose the group's learning rate first; none where it is given, taken from another group, or
        nothing is trained.
        """
        return [self.trial(group, lr) for lr in self.spec.tune.lr] if self.spec.tune and self._searches(group) else []

    def trial(self, group: RunGroup, lr: float) -> PlannedRun:
        """The run of the search that tries `lr`."""
        assert self.spec.tune is not None, "trials belong to a search"
        return self._plan(group, TUNE, lr, self.spec.tune.seed)

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

    def finals(self, group: RunGroup, lr: float | None, searched: Mapping[str, Any] | None = None) -> list[PlannedRun]:
        """The runs that tables show, at a learning rate and with what was searched for it."""
        plans = [self._plan(group, FINAL, lr, seed) for seed in self._seeds(group)]
        return [replace(plan, searched=dict(searched)) for plan in plans] if searched else plans

    def count(self) -> int:
        """How many runs there are, those counted once that serve both ends; those that extend a search are not known
        before.
        """
        finals = sum(len(self._seeds(group)) for group in self.groups)
        if self.spec.tune is None:
            return finals
        shared = self.spec.tune.seed in self.spec.seeds
        return finals + sum(map(self._searches, self.groups)) * (len(self.spec.tune.lr) - shared)

    def count_done(self, kept: Mapping[str, RunResult]) -> int:
        """How many runs of a folder this spec wants, whichever of their learning rates it will choose."""
        rates = {result.lr for result in kept.values() if not math.isnan(result.lr)}
        wanted: set[str] = set()
        for group in self.groups:
            searched = self.spec.tune is not None and not group.untrained
            for lr in rates if searched else [None]:
                wanted |= {plan.id for plan in self.finals(group, lr)}
            wanted |= {self.trial(group, lr).id for lr in rates if searched}
        return len(wanted & kept.keys())

    def _searches(self, group: RunGroup) -> bool:
        """Whether the group searches a learning rate of its own."""
        return self.spec.tune is not None and not group.untrained and self.lr_source(group) == group

    def _seeds(self, group: RunGroup) -> tuple[int, ...]:
        """Nothing of a backbone without examples depends on a seed."""
        alike = group.untrained is not None and not group.untrained.shots
        return self.spec.seeds[:1] if alike else self.spec.seeds

    def _groups(self) -> Iterator[RunGroup]:
        for backbone in self.spec.backbones:
            for task in self.spec.tasks:
                for method in self.spec.methods:
                    if method.name == BACKBONE and not _asked(method, self.spec.choice_of(method, task)):
                        continue
                    for budget, options in self._sizes(method, backbone):
                        pairs = tuple(sorted((key, _frozen(value)) for key, value in options.items()))
                        yield RunGroup(method.name, label_of(method), pairs, task.task, backbone, budget)

    def _sizes(self, method: MethodChoice, backbone: str) -> Iterator[tuple[int | None, dict[str, Any]]]:
        for budget in self.spec.budgets or (None,):
            trains = method.name != BACKBONE and budget is not None
            yield budget, sized(method, backbone, budget) if trains and budget else method.options

    def _plan(self, group: RunGroup, stage: str, lr: float | None, seed: int) -> PlannedRun:
        plain = self.spec.task(group.task)
        choice = self.spec.choice_of(self._method(group), plain)
        key = data_key(plain, choice)
        task = get_task(choice.task, choice.wording)
        settings = self.spec.training_of(self._method(group), choice, lr, seed)
        training = _weights(settings) if group.untrained else settings.to_dict()
        chat = self.spec.chat_template and task.as_chat and has_chat_template(group.backbone)
        depends = {
            **asdict(group),
            "label": None,
            "wording": task.stored_wording,
            "training": training,
            "num_beams": self.spec.num_beams,
            "theta": self.spec.theta,
            "data": self._digests[key],
            "backbone_digest": resolve_backbone(group.backbone).digest,
            **self._judge(choice),
            **({"chat": True} if chat else {}),
            **({} if group.untrained else _measures(self.spec.forgetting, self.spec.serving)),
            **({"seed": seed} if group.untrained else {}),  # that of a training is among its settings
        }
        return PlannedRun(
            id=hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16],
            stage=stage,
            comparison=self.spec.name,
            group=group,
            wording=task.stored_wording,
            seed=seed,
            training=training,
            num_beams=self.spec.num_beams,
            eval_batch_size=self.spec.eval_batch_size,
            theta=self.spec.theta,
            chat=chat,
            data_key=key,
            forgetting=self.spec.forgetting,
            serving=self.spec.serving,
        )

    def _judge(self, task: TaskChoice) -> dict[str, Any]:
        """Who marks the answers, where somebody does."""
        marked = self.spec.judge and any(TASKS[other.task].metric == "judge" for other in task.evaluations)
        return {"judge": self.spec.judge.model} if self.spec.judge and marked else {}

    def _method(self, group: RunGroup) -> MethodChoice:
        return self._methods[group.label]


def _asked(method: MethodChoice, task: TaskChoice) -> bool:
    """Whether the backbone can be asked any of a task's evaluations in this way."""
    way = Untrained.of(method.options)
    return any(way.fits(get_task(other.task, other.wording)) for other in task.evaluations)


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
            if method.name == BACKBONE:
                continue
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

    A method without a size (full, RED) keeps its options, and one whose size ends before the budget has its largest.
    Raises ConfigError for options that do not fit.
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

    def fits(value: int) -> bool:
        try:
            return count(value) > 0
        except ConfigError:  # beyond what the method or the backbone's shapes allow
            return False

    guess = max(1, 1 + round((budget - one) / (two - one)))
    near = list(filter(fits, range(max(1, guess - 1), guess + 2)))
    near = near or [bisect_left(range(1, guess), True, key=lambda value: not fits(value))]  # the largest that fits
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
        if group.budget is not None and not group.untrained:
            count = count_parameters_of(group.method, _key(dict(group.options)), group.backbone)
            if abs(count - group.budget) > BUDGET_TOLERANCE * group.budget:
                lines[f"budget {group.budget:,} on {group.backbone}: {group.label} has {count:,} at the nearest"] = None
    return list(lines)


def _key(options: dict[str, Any]) -> str:
    return json.dumps(options, sort_keys=True)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _weights(training: TrainingSpec) -> dict[str, Any]:
    """How methods have the backbone's weights, as which it is asked; empty for plain float32 ones, so that ids of
    earlier runs do not change."""
    held = {"precision": training.precision, "backbone_dtype": training.backbone_dtype}
    return {name: value for name, value in held.items() if value != TrainingSpec.model_fields[name].default}


def _measures(forgetting: ForgettingSpec | None, serving: ServingSpec | None) -> dict[str, Any]:
    """What a run's id depends on; empty if neither is measured, so that ids of earlier runs do not change."""
    known: dict[str, Any] = {}
    if forgetting is not None:
        known["forgetting"] = {**forgetting.model_dump(exclude={"data"}), "text": text_digest()}
    if serving is not None:
        known["serving"] = serving.model_dump()
    return known
