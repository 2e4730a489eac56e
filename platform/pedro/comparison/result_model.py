"""What a comparison is made of once it ran: runs with their scores, which of them tables show, the tables' entries, and
what a paper reports for the same methods and tasks, shown beside and never mixed with ours.

Plain data, shared by spec, planner, executor, tables, captions and renderers. Imports neither torch nor Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pedro.comparison.imported import ImportedRun
    from pedro.comparison.statistics import BootstrapSamples

SCHEMA = 1
TUNE, FINAL = "tune", "final"
FINISHED, FAILED = "finished", "failed"
STAGES, STATES = (TUNE, FINAL), (FINISHED, FAILED)
EARLY, CAP = "early stopping", "cap"  # what ended a training
AVERAGE = "Avg."
BEST, SECOND = "best", "second"
BACKBONE = "backbone"  # the name that stands in `methods` for the backbone itself, with nothing trained
JUDGE = "judge"  # the metric whose values are marks from 1 to 10 and not fractions
BUDGET_TOLERANCE = 0.1  # of a budget: a method farther from it is named
TableKey = tuple[str, int | None]
"""Backbone and budget: what one table is of."""


@dataclass(frozen=True)
class TaskResult:
    """The score of a trained model on the test rows of one task. Values are fractions (a judge's marks 1 to 10).

    `majority` is what always giving the rows' own most frequent answer scores; `per_row` the main metric
    of each row, the same rows for every run; `left_out` how many rows did not fit into the model.
    """

    task: str
    metric: str
    value: float
    parts: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    unparsed: int = 0
    groups: dict[str, float] = field(default_factory=dict)
    majority: float | None = None
    per_row: tuple[float, ...] = ()
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {name: _plain(getattr(self, name)) for name in _names(TaskResult)}

    @classmethod
    def from_dict(cls, values: Any) -> TaskResult:
        """Unknown keys are ignored. Raises ValueError that says what is missing or wrong."""
        known = _known(cls, values, "score", required=("task", "metric", "value"))
        if known["value"] is None:
            raise ValueError("score.value: expected a number, got null")
        return cls(**{**known, "per_row": tuple(map(float, known.get("per_row") or ()))})


@dataclass(frozen=True)
class RunResult:
    """One run: what was trained and how, its scores, what it cost. A failed one has a message and no scores.

    `tokens_per_second` counts all tokens that training put through the model, padding excluded; `tokens` and
    `answer_tokens_per_second` those of answers, which the loss is taken of. `ended_by` says whether validation ended
    training or its steps were over, `searched` how the learning rate was found. Runs of earlier versions lack them.

    `adapter_bytes` counts what is trained, `saved_bytes` the file it is saved in. `forgetting` holds `loss_before` and
    `loss` (nats of a token of general text, without and with the adapter), `tokens`, and where a general task was asked
    `task`, `score_before`, `score` and `rows`. `not_served` says why `served_tokens_per_second` is not known.
    """

    id: str
    stage: str
    comparison: str
    method: str
    label: str
    task: str
    backbone: str
    seed: int
    state: str
    lr: float = math.nan
    options: dict[str, Any] = field(default_factory=dict)
    wording: str = ""
    title: str = ""
    budget: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    scores: tuple[TaskResult, ...] = ()
    validation: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0
    trainable_without_bias: int = 0
    adapter_bytes: int = 0
    steps: int = 0
    optimizer_steps: int = 0
    best_step: int = 0
    ended_by: str = ""
    prompt_format: str = ""
    searched: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    all_tokens: int = 0
    samples: int = 0
    seconds: float = 0.0
    scoring_seconds: float = 0.0
    tokens_per_second: float = 0.0
    answer_tokens_per_second: float = 0.0
    samples_per_second: float = 0.0
    peak_memory_bytes: int = 0
    saved_bytes: int = 0
    served_tokens_per_second: float = 0.0
    not_served: str = ""
    forgetting: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    activations: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state == FINISHED

    def to_dict(self) -> dict[str, Any]:
        """Every key, with null where it does not apply."""
        values = {name: _plain(getattr(self, name)) for name in _names(RunResult)}
        values["scores"] = [score.to_dict() for score in self.scores]
        if not self.finished:  # nothing was measured, which is not the same as zero
            values |= {name: None for name in _MEASURED if not values[name]}
        return {"schema": SCHEMA, **values}

    @classmethod
    def from_dict(cls, values: Any) -> RunResult:
        """Unknown keys are ignored. Raises ValueError that says what is missing or wrong."""
        schema = values.get("schema") if isinstance(values, Mapping) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ValueError(f"schema: {schema} is newer than this program knows ({SCHEMA}); update it")
        known = _known(cls, values, "run", required=_REQUIRED)
        for name, allowed in (("stage", STAGES), ("state", STATES)):
            if known[name] not in allowed:
                raise ValueError(f"run.{name}: expected {' or '.join(allowed)}, got {known[name]!r}")
        scores = known.get("scores") or ()
        if not isinstance(scores, Sequence):
            raise ValueError(f"run.scores: expected a list, got {type(scores).__name__}")
        if "answer_tokens_per_second" not in values:  # earlier versions counted answers alone, under the other's name
            known["answer_tokens_per_second"] = known.pop("tokens_per_second", 0.0)
        curves = {name: [_point(point) for point in curve] for name, curve in known.get("curves", {}).items()}
        return cls(**{**known, "curves": curves, "scores": tuple(map(TaskResult.from_dict, scores))})


_REQUIRED = ("id", "stage", "comparison", "method", "label", "task", "backbone", "seed", "state")
_MEASURED = (
    *("validation", "trainable_parameters", "trainable_without_bias", "adapter_bytes", "steps", "optimizer_steps"),
    *("best_step", "tokens", "all_tokens", "samples", "seconds", "scoring_seconds", "tokens_per_second"),
    *("answer_tokens_per_second", "samples_per_second", "peak_memory_bytes", "saved_bytes"),
    *("served_tokens_per_second", "forgetting"),
)


@dataclass(frozen=True)
class Comparison:
    """A folder of runs. `problems` names each file that could not be read; `metadata` is comparison.json itself."""

    folder: Path
    name: str
    title: str
    equal: str
    baseline: str
    runs: tuple[RunResult, ...]
    problems: tuple[str, ...]
    metadata: dict[str, Any]
    imported: tuple[ImportedRun, ...] = ()
    """Results of others, shown beside."""


@dataclass(frozen=True)
class Selection:
    """The final runs that tables show, and the orders of methods, tables and columns."""

    comparison: Comparison
    runs: tuple[RunResult, ...]
    left_out: int
    """Final runs that are not shown: see `select`."""
    labels: tuple[str, ...]
    table_keys: tuple[TableKey, ...]
    columns: Mapping[str, Sequence[str]]
    """Which columns the training on a task leads to: itself, or the tasks that its model is scored on."""
    tasks: tuple[str, ...]
    """Every column once, in order."""


@dataclass(frozen=True)
class Difference:
    """A method's value minus the baseline's, on the same rows. `proven`: its interval excludes zero."""

    value: float
    low: float
    high: float
    proven: bool


@dataclass(frozen=True)
class TableEntry:
    """A method on a task: the median over seeds, as a fraction (a judge's mark 1 to 10), and its 95 % interval.

    `value`, `low` and `high` are None where every run failed. `proven` is set for the best alone: the interval of its
    difference to every other method of the column excludes zero, none of its runs failed, and it is not at chance.
    `at_chance`: the interval holds the majority rate, or lies below it. `gain` is the difference to the baseline.
    """

    label: str
    method: str
    task: str
    backbone: str
    budget: int | None
    parameters: int
    metric: str
    value: float | None
    low: float | None
    high: float | None
    seeds: int
    mark: str = ""
    proven: bool = False
    at_chance: bool = False
    failed: int = 0
    reason: str = ""
    majority: float | None = None
    rows: int = 0
    left_out: int = 0
    values: tuple[tuple[int, float], ...] = ()
    """(seed, value) of each finished run."""
    lrs: tuple[tuple[int, float], ...] = ()
    """(seed, learning rate) of each run."""
    gain: Difference | None = None
    samples: BootstrapSamples | None = field(default=None, repr=False, compare=False)
    """The bootstrap samples of `value`; differences to other entries are taken from them."""


@dataclass(frozen=True)
class Cost:
    """What a method's runs took or did, beside its scores: the median over runs, the least and the most.

    All None, with a reason, where it could not be measured of any.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """Methods × tasks on one backbone at one budget. A method that did not run on a task has no entry there."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    entries: Mapping[tuple[str, str], TableEntry]
    notes: tuple[str, ...]
    baseline: str
    backbone: str
    budget: int | None
    parameters: Mapping[str, tuple[int, int]]
    """Least and most trained parameters of a method over the tasks; mostly the same."""
    costs: Mapping[tuple[str, str], Cost] = field(default_factory=dict)
    """By label and name of a metric (`costs.METRICS`): what was asked to be measured beside scores."""


@dataclass(frozen=True)
class Paper:
    """Numbers as printed in `table` of `source`; None where the paper has none."""

    source: str
    table: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, float | None]]
    note: str = ""

    @property
    def title(self) -> str:
        return f"As reported in the paper ({', '.join(part for part in (self.source, self.table) if part)})"

    def value(self, label: str, column: str) -> float | None:
        """The paper's number; None where it has none."""
        return self.rows.get(label, {}).get(column)


def parse_paper(block: Any) -> Paper | None:
    """A `paper` block: source, table, columns, rows by label. Raises ValueError that says what is wrong with it."""
    if block is None:
        return None
    if not isinstance(block, Mapping) or not isinstance(block.get("rows"), Mapping):
        raise ValueError("paper: expected source, table, columns and rows by method")
    rows = {str(label): _paper_row(label, row) for label, row in block["rows"].items()}
    named = dict.fromkeys(column for row in rows.values() for column in row)
    columns = tuple(map(str, block.get("columns") or named))
    if unknown := [column for column in named if column not in columns]:
        raise ValueError(f"paper.rows: {', '.join(unknown)} not in paper.columns ({', '.join(columns)})")
    source, table, note = (str(block.get(key) or "") for key in ("source", "table", "note"))
    return Paper(source, table, columns, rows, note)


def position(item: Any, order: Sequence[Any]) -> int:
    """Where an item stands; behind all others if it is not there."""
    return order.index(item) if item in order else len(order)


def format_score(value: float, metric: str, sign: bool = False) -> str:
    """A fraction in percent with one decimal, a judge's mark with two."""
    scale, digits = (1, 2) if metric == JUDGE else (100, 1)
    text = f"{value * scale:{'+' if sign else ''}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text


def _plain(value: Any) -> Any:
    """As JSON holds it: NaN and infinity as null, whole floats as integers (per_row is mostly 0 and 1)."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value


def _point(point: Sequence[float | None]) -> list[float]:
    """A point of a curve; null is how `_plain` writes a loss that became NaN."""
    return [math.nan if value is None else value for value in point]


def _names(kind: type[Any]) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


def _known(kind: type[Any], values: Any, where: str, required: Sequence[str]) -> dict[str, Any]:
    """The values for the fields of `kind`; null means a field's default. Raises ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    missing = [name for name in required if values.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    known: dict[str, Any] = {}
    for item in fields(kind):
        value = values.get(item.name)
        if value is None:
            continue
        expected = _KINDS.get(str(item.type).partition("[")[0].partition(" |")[0])
        if expected and (not isinstance(value, expected[0]) or isinstance(value, bool)):
            raise ValueError(f"{where}.{item.name}: expected {expected[1]}, got {value!r:.60}")
        known[item.name] = float(value) if item.type == "float" else value
    return known


def _paper_row(label: Any, row: Any) -> dict[str, float | None]:
    if not isinstance(row, Mapping):
        raise ValueError(f"paper.rows.{label}: expected a number for each column")
    for column, value in row.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"paper.rows.{label}.{column}: expected a number or null, got {value!r}")
    return {str(column): value for column, value in row.items()}


_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "dict": (Mapping, "an object"),
}
