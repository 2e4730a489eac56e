"""What a comparison is asked to do: the YAML of `pedro compare`, read, its paths made absolute, frozen and checked
without torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pedro.backbone import locate_backbone
from pedro.comparison.result_model import BACKBONE, parse_paper
from pedro.comparison.spec_sections import ForgettingSpec, JudgeSpec, RunResources, Seed, ServingSpec, TuneSpec
from pedro.comparison.untrained import Untrained
from pedro.config import Settings, check_name
from pedro.data.tasks import TASKS, TEMPLATE, get_task
from pedro.errors import ConfigError
from pedro.spec_reader import Frozen, load_spec, mistakes, read_yaml
from pedro.training.allowed_files import check_allowed_backbones, check_allowed_files
from pedro.training.quantised_check import must_be_whole
from pedro.training.spec import ASSETS, TrainingSpec

KINDS = ("comparison", "efficiency")
DATA_VARIABLE = "PEDRO_TASK_DATA"
SIZES = ("r", "tokens")  # the option that a budget of parameters decides, the first that a method has
Positive = Annotated[int, Field(ge=1, le=10**12)]
MOST_RUNS = 100_000
T = TypeVar("T")


def _printable(block: dict[str, Any] | None) -> dict[str, Any] | None:
    _checked_json("paper", block)
    parse_paper(block)
    return block


PaperBlock = Annotated[dict[str, Any] | None, AfterValidator(_printable)]


class Evaluation(Frozen):
    """A task that trained models are scored on; a name alone will do."""

    task: str
    """As `pedro tasks` lists it."""
    wording: str = TEMPLATE
    """In which words prompts are put; `template` is within the chat template of a backbone that has one."""
    shots: int = Field(0, ge=0)
    """Worked examples before each prompt."""
    data: str | None = None
    """Where its files are, if not where those of the others are."""
    test_rows: Positive | None = None
    """At most this many rows are scored."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        return {"task": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> Evaluation:
        _checked(lambda: get_task(self.task, self.wording, self.shots))
        return self


class TaskChoice(Evaluation):
    """A task that models are trained on. All its rows are used where no number is given."""

    train_rows: Positive | None = None
    """At most this many rows are trained on."""
    validation_rows: Positive | None = 500
    """Rows that choose the learning rate and the best checkpoint; 15 % of train where the task has no such split."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Laid over the comparison's `training` for this task."""
    evaluate: tuple[Evaluation, ...] = ()
    """Other tasks that the trained model is scored on in place of this one (Alpaca, then MMLU)."""
    tune_like: str | None = None
    """The learning rate that was chosen on another task of the comparison is taken here, and none is searched."""

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """What is scored after training."""
        return self.evaluate or (self,)


class MethodChoice(BaseModel):
    """A method with its options beside its name, as in a fine-tuning job; a name alone will do. `backbone` is the
    backbone itself, asked with `shots` examples; `by: match` takes what it writes, in place of its likeliest label.

    What is neither name, label, training nor wording is an option of the method.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str
    """As `pedro methods` lists it."""
    label: str = ""
    """What tables call it; the method's title, with the options given, if not set."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Laid over the comparison's `training`, and the task's."""
    wording: str = ""
    """In place of the tasks' own: for a row that shows what the words do."""

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "peft", **value} if isinstance(value, dict) and "peft_type" in value else value

    @model_validator(mode="after")
    def _plain(self) -> MethodChoice:
        _checked_json(self.name, self.options)
        if self.name == BACKBONE:
            Untrained.of(self.options)
        _checked_line("label", self.label)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What is an option of the method."""
        return dict(self.model_extra or {})


class ComparisonSpec(Frozen):
    """Methods × tasks × backbones × budgets × seeds."""

    kind: Literal["comparison"] = "comparison"  # tells it from an efficiency spec
    name: str  # of the folder of its results
    title: str = ""  # above its tables
    backbones: tuple[str, ...] = Field(("stories260K",), min_length=1)  # a table each
    tasks: tuple[TaskChoice, ...] = Field(min_length=1)  # the columns
    methods: tuple[MethodChoice, ...] = Field(min_length=1)  # the rows
    budgets: tuple[Positive, ...] = ()
    """Numbers of trained parameters: each method's size (r, or tokens) is set so that it comes nearest."""
    seeds: tuple[Seed, ...] = Field((0, 1, 2, 3, 4), min_length=1)  # a run each
    equal: Literal["compute", "parameters", "effort"] = "compute"
    """What all methods have alike, for the table to say: steps and rows, or (also) the number of parameters; or the
    effort: rows, search, and what ends training."""
    baseline: str = ""
    """The label that differences are taken from; the first method's if not given."""
    data: str | None = None
    """Where tasks find their files: a directory, or "hub"; PEDRO_TASK_DATA, or what the package carries, without it."""
    chat_template: bool = True
    """Whether rows in the wording `template` stand in the chat template of a backbone that has one; shorter without."""
    theta: float = Field(0.1, ge=0, lt=1)
    """Share of the training rows for Θ steps, for methods that have them."""
    training: dict[str, Any] = Field(default_factory=dict)
    """As `training` of a fine-tuning job, without its seed, and without `lr` where `tune` searches it."""
    tune: TuneSpec | None = None
    num_beams: Positive = 1  # of the search that answers are generated by; 1 is greedy
    eval_batch_size: Positive = 64  # rows that are answered together
    judge: JudgeSpec | None = None
    forgetting: ForgettingSpec | None = None
    serving: ServingSpec | None = None
    resources: RunResources = RunResources()
    concurrency: Positive | None = None
    """Runs at a time; as many as the cluster has room for if not given."""
    paper: PaperBlock = None
    """What a paper reports for these columns, shown beside: source, table, rows."""

    @field_validator("title")
    @classmethod
    def _title(cls, value: str) -> str:
        return _checked_line("title", value)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _checked(lambda: check_name("name", value))

    @model_validator(mode="after")
    def _bounded(self) -> ComparisonSpec:
        factors = (self.backbones, self.tasks, self.methods, self.budgets or (0,), self.seeds)
        runs = math.prod(map(len, factors))
        if runs > MOST_RUNS:
            raise ValueError(
                f"{runs:,} runs, and a comparison may have {MOST_RUNS:,}; take out seeds, tasks or methods"
            )
        return self

    @model_validator(mode="after")
    def _each_once(self) -> ComparisonSpec:
        names = [task.task for task in self.tasks]
        scored = [other.task for task in self.tasks for other in task.evaluations]
        lists = (
            *((names, "tasks"), (scored, "tasks.evaluate"), (self.labels, "methods"), (self.seeds, "seeds")),
            *((self.backbones, "backbones"), (self.budgets, "budgets"), (self.tune.lr if self.tune else (), "tune.lr")),
        )
        for listed, what in lists:
            if twice := [item for item in dict.fromkeys(listed) if list(listed).count(item) > 1]:
                hint = "; give the second a label" if what == "methods" else ""
                raise ValueError(f"{what}: {twice[0]!r} appears twice{hint}")
        same: dict[Any, str] = {}
        for method in self.methods:
            runs = [self.training_of(method, task, None).model_dump_json() for task in self.tasks]
            key = (method.name, method.wording, json.dumps(method.options, sort_keys=True), *runs)
            if key in same:
                raise ValueError(f"methods: {same[key]!r} and {label_of(method)!r} are the same runs; leave one out")
            same[key] = label_of(method)
        return self

    @model_validator(mode="after")
    def _possible(self) -> ComparisonSpec:
        names = [task.task for task in self.tasks]
        if self.baseline and self.baseline not in self.labels:
            raise ValueError(f"baseline: {self.baseline!r} is none of {', '.join(self.labels)}")
        for task in self.tasks:
            other = task.tune_like
            if other and (self.tune is None or other == task.task or other not in names):
                raise ValueError(f"tasks.{task.task}.tune_like: expected another task of `tasks`, with `tune` given")
            if other and self.task(other).tune_like:
                raise ValueError(f"tasks.{task.task}.tune_like: {other} takes its own from elsewhere; name that one")
        for method in self.methods:
            for task in self.tasks:
                evaluations = _checked(partial(self.choice_of, method, task)).evaluations
                training = self.training_of(method, task, None)
                kind = training.backbone_dtype if method.name != BACKBONE else None
                if kind and (why := must_be_whole(kind, method.name, method.options)):
                    raise ValueError(f"methods.{label_of(method)}: training.backbone_dtype: {why}")
                if method.name == BACKBONE:
                    scored = [get_task(other.task, other.wording) for other in evaluations]
                    Untrained.of(method.options).check(task.task, scored)
        if self.forgetting and self.forgetting.task in names:
            raise ValueError(f"forgetting.task: {self.forgetting.task} is trained on; name a task that is not")
        for where, given in self._trainings():
            if "seed" in given:
                raise ValueError(f"{where}.seed: `seeds` of the comparison says which; leave it out here")
            if "lr" in given and self.tune:
                raise ValueError(f"{where}.lr: `tune` searches the learning rate; leave out one of the two")
        return self

    def _trainings(self) -> list[tuple[str, dict[str, Any]]]:
        """Every `training` of the spec, and how to call it."""
        tasks = [(f"tasks.{task.task}.training", task.training) for task in self.tasks]
        methods = [(f"methods.{label_of(method)}.training", method.training) for method in self.methods]
        return [("training", self.training), *tasks, *methods]

    @property
    def labels(self) -> list[str]:
        """What tables call the methods."""
        return [label_of(method) for method in self.methods]

    def task(self, name: str) -> TaskChoice:
        """The task called so."""
        return next(task for task in self.tasks if task.task == name)

    def choice_of(self, method: MethodChoice, task: TaskChoice) -> TaskChoice:
        """The task as this method is shown it. Raises ConfigError for a wording that it does not have."""
        if not method.wording or method.wording == task.wording:
            return task
        get_task(task.task, method.wording, task.shots)
        return task.model_copy(update={"wording": method.wording})

    def training_of(self, method: MethodChoice, task: TaskChoice, lr: float | None, seed: int = 0) -> TrainingSpec:
        """What one run trains with: the comparison's settings, the task's over them, then the method's."""
        settings = {**self.training, **task.training, **method.training, "seed": seed}
        if lr is not None:
            settings["lr"] = lr
        try:
            return TrainingSpec.model_validate(settings)
        except ValidationError as error:
            wrong = "; ".join(f"training.{line}" for line in mistakes(error, TrainingSpec))
            raise ValueError(f"{wrong} ({label_of(method)} on {task.task})") from None

    def data_of(self, choice: Evaluation) -> str | None:
        """Where a task's rows are."""
        folder = choice.data or self.data or os.environ.get(DATA_VARIABLE)
        if TASKS[choice.task].packaged is not None and choice.data is None:
            return None  # the same rows for everybody
        return folder

    def to_dict(self) -> dict[str, Any]:
        """The resolved spec as JSON holds it."""
        return self.model_dump(mode="json")


class EfficiencySpec(Frozen):
    """The paper's table 3: tokens per second and peak memory, by `jobs/bench.py efficiency`."""

    kind: Literal["efficiency"]  # tells it from a comparison
    name: str  # of its results
    title: str = ""  # above its table
    device: Literal["cpu", "cuda"] = "cpu"  # where the models run
    models: tuple[str, ...] = ("S",)  # sizes of the benchmark's models
    batches: tuple[Positive, ...] | None = None  # tenants at once; the first counts
    rounds: Positive | None = None  # how often each engine is measured
    threads: Positive | None = None  # of the CPU; all cores if not given
    paper: PaperBlock = None  # what a paper reports, shown beside


def load_comparison_spec(path: str | Path, overrides: Iterable[str] = ()) -> ComparisonSpec | EfficiencySpec:
    """Read a spec file; relative paths start from its folder. Raises one ConfigError that lists every mistake."""
    overrides = list(overrides)
    spec: ComparisonSpec | EfficiencySpec
    kind = _kind(path, overrides)
    if kind not in KINDS:
        raise ConfigError(f"kind: expected {' or '.join(KINDS)}, got {kind!r}", param="kind")
    if kind == "efficiency":
        return load_spec(path, overrides, EfficiencySpec)
    spec = load_spec(path, overrides, ComparisonSpec)
    base = Path(path).absolute().parent
    backbones = tuple(locate_backbone(name, base, Path.cwd()) for name in spec.backbones)
    tasks = [_located(task, base) for task in spec.tasks]
    _check_places(spec, tasks, backbones, base, overrides)
    changes: dict[str, object] = {"backbones": backbones, "data": _resolved(spec.data, base), "tasks": tuple(tasks)}
    if spec.forgetting:
        own = {"data": _resolved(spec.forgetting.data, base)}
        changes["forgetting"] = spec.forgetting.model_copy(update=own)
    return spec.model_copy(update=changes)


def _check_places(
    spec: ComparisonSpec, tasks: list[TaskChoice], backbones: tuple[str, ...], base: Path, overrides: Iterable[str]
) -> None:
    """Raise ConfigError for a folder, of data or a backbone, that a spec may not name; by hand it may lie anywhere."""
    given = {override.partition("=")[0] for override in overrides}
    folders = {"data": _resolved(spec.data, base)}
    folders |= {"forgetting.data": _resolved(spec.forgetting.data, base)} if spec.forgetting else {}
    for number, task in enumerate(tasks):
        folders[f"tasks.{number}.data"] = task.data
        folders |= {f"tasks.{number}.evaluate.{n}.data": other.data for n, other in enumerate(task.evaluate)}
    local = {field: folder for field, folder in folders.items() if folder and folder != "hub"}
    settings = Settings.from_env()
    check_allowed_files(local, settings, [base], given)
    for name in backbones:
        check_allowed_backbones({"backbones": name}, settings, [base, ASSETS], given)


def _located(task: TaskChoice, base: Path) -> TaskChoice:
    evaluate = tuple(other.model_copy(update={"data": _resolved(other.data, base)}) for other in task.evaluate)
    return task.model_copy(update={"data": _resolved(task.data, base), "evaluate": evaluate})


def _resolved(data: str | None, base: Path) -> str | None:
    return data if data in (None, "hub") else str(base / Path(data).expanduser())


def _kind(path: str | Path, overrides: Iterable[str]) -> str:
    if given := [override.removeprefix("kind=") for override in overrides if override.startswith("kind=")]:
        return given[-1]
    try:
        fields = read_yaml(path)
    except ConfigError:
        return "comparison"  # `load_spec` says what is wrong
    return str(fields.get("kind", "comparison")) if isinstance(fields, Mapping) else "comparison"


def data_key(choice: TaskChoice, asked: TaskChoice) -> str:
    """What the rows of a task are called; `asked` is the task in other words, where a method has such."""
    return choice.task if asked.wording == choice.wording else f"{choice.task}, {asked.wording}"


def label_of(method: MethodChoice) -> str:
    """What tables call a method: its label, or its title with the options that were given."""
    if method.label:
        return method.label
    if method.name == BACKBONE:
        return Untrained.of(method.options).label
    from pedro.methods.registry import METHODS

    title = METHODS[method.name].title.partition(":")[0] if method.name in METHODS else method.name
    if method.name == "peft":
        title = str(method.options.get("peft_type", "PEFT"))
    given = ", ".join(f"{key}={value}" for key, value in method.options.items() if key != "peft_type")
    return f"{title} ({given})" if given else title


def _checked_line(where: str, text: str) -> str:
    """Raise ValueError for what tables cannot hold in a line."""
    if not text.isprintable():
        raise ValueError(f"{where}: expected one line without control characters, got {text!r:.60}")
    return text


def _checked_json(where: str, value: Any) -> None:
    """Raise ValueError for what a result file cannot hold: dates, sets, NaN."""
    try:
        json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: expected text, numbers, lists and mappings by text ({error})") from None


def _checked(check: Callable[[], T]) -> T:
    """A ConfigError as the ValueError that pydantic collects."""
    try:
        return check()
    except ConfigError as error:
        raise ValueError(error.message.partition(": ")[2]) from error
