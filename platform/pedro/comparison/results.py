"""What a comparison leaves on disk, and how it is read back: comparison.json and one JSON a run under cells/.

Knows nothing of how runs are made, of statistics or of tables; imports neither torch nor Ray. A run here is a *cell*:
a method with its options, a task, a backbone, a budget, a learning rate and a seed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1
HEAD, CELLS = "comparison.json", "cells"
TUNE, FINAL = "tune", "final"
FINISHED, FAILED = "finished", "failed"
STAGES, STATES, BUDGETS = (TUNE, FINAL), (FINISHED, FAILED), ("parameters", "compute")


@dataclass(frozen=True)
class TaskResult:
    """The score of a trained model on the test rows of one task. Values are fractions (a judge's marks 1 to 10).

    `majority` is what always giving the rows' own most frequent answer scores; `per_row` the headline
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
    def from_dict(cls, tree: Any) -> TaskResult:
        """Keys it does not know are ignored. Raises ValueError that says what is missing or wrong."""
        values = _known(cls, tree, "score", required=("task", "metric", "value"))
        if values["value"] is None:
            raise ValueError("score.value: expected a number, got null")
        return cls(**{**values, "per_row": tuple(map(float, values.get("per_row") or ()))})


@dataclass(frozen=True)
class Cell:
    """One run: what was trained and how, its scores, what it cost. A failed one has a message and no scores."""

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
    tokens: int = 0
    seconds: float = 0.0
    scoring_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    activations: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state == FINISHED

    def to_dict(self) -> dict[str, Any]:
        """Every key, with null where it does not apply."""
        tree = {name: _plain(getattr(self, name)) for name in _names(Cell)}
        tree["scores"] = [score.to_dict() for score in self.scores]
        if not self.finished:  # nothing was measured, which is not the same as zero
            tree |= {name: None for name in _MEASURED if not tree[name]}
        return {"schema": SCHEMA, **tree}

    @classmethod
    def from_dict(cls, tree: Any) -> Cell:
        """Keys it does not know are ignored. Raises ValueError that says what is missing or wrong."""
        schema = tree.get("schema") if isinstance(tree, Mapping) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ValueError(f"schema: {schema} is newer than this program knows ({SCHEMA}); update it")
        values = _known(cls, tree, "cell", required=_REQUIRED)
        for name, allowed in (("stage", STAGES), ("state", STATES)):
            if values[name] not in allowed:
                raise ValueError(f"cell.{name}: expected {' or '.join(allowed)}, got {values[name]!r}")
        scores = values.get("scores") or ()
        if not isinstance(scores, Sequence):
            raise ValueError(f"cell.scores: expected a list, got {type(scores).__name__}")
        curves = {name: [_point(point) for point in curve] for name, curve in values.get("curves", {}).items()}
        return cls(**{**values, "curves": curves, "scores": tuple(map(TaskResult.from_dict, scores))})


_REQUIRED = ("id", "stage", "comparison", "method", "label", "task", "backbone", "seed", "state")
_MEASURED = (
    *("validation", "trainable_parameters", "trainable_without_bias", "adapter_bytes", "steps", "optimizer_steps"),
    *("best_step", "tokens", "seconds", "scoring_seconds", "tokens_per_second", "peak_memory_bytes"),
)


@dataclass(frozen=True)
class Comparison:
    """A folder of runs. `problems` names each file that could not be read; `head` is comparison.json itself."""

    folder: Path
    name: str
    title: str
    equal: str
    baseline: str
    cells: tuple[Cell, ...]
    problems: tuple[str, ...]
    head: dict[str, Any]


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder. Never raises for a broken file: it is named in `problems`, the rest is there."""
    folder = Path(folder)
    problems: list[str] = []
    head = _read(folder / HEAD, problems)
    cells: list[Cell] = []
    if head is not None:
        head = {key: value for key, value in head.items() if _fits(key, value, problems)}
        cells, broken = read_cells(folder)
        problems += broken
    head = head or {}
    name = str(head.get("name") or folder.name)
    return Comparison(
        folder=folder,
        name=name,
        title=str(head.get("title") or name),
        equal=head["equal"] if head.get("equal") in BUDGETS else "compute",
        baseline=str(head.get("baseline") or ""),
        cells=tuple(cells),
        problems=tuple(problems),
        head=head,
    )


def read_cells(folder: Path) -> tuple[list[Cell], list[str]]:
    """The runs in a comparison's folder, and for each file that could not be read its name and the reason."""
    cells: list[Cell] = []
    problems: list[str] = []
    for path in sorted((Path(folder) / CELLS).glob("*.json")):
        place = f"{CELLS}/{path.name}"
        tree = _read(path, problems, place)
        if tree is None:
            continue
        try:
            cell = Cell.from_dict(tree)
            if cell.id != path.stem:
                raise ValueError(f"cell.id: expected {path.stem}, as the file is called, got {cell.id!r:.60}")
            cells.append(cell)
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{place}: {error}")
    return cells, problems


def read_comparisons(*roots: Path) -> list[Comparison]:
    """Every sub-folder of `roots` with a comparison.json, by name; a root that is not there has none."""
    heads = [path for root in roots for path in sorted(Path(root).glob(f"*/{HEAD}"))]
    return [read_comparison(path.parent) for path in heads]


def write_cell(folder: Path, cell: Cell) -> None:
    """Write a run's JSON, whole or not at all; one line a key, so that a changed run is a small change."""
    path = Path(folder) / CELLS / f"{cell.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f" {json.dumps(key)}: {_json(value)}" for key, value in cell.to_dict().items())
    scratch = path.with_name(f".{cell.id}.{os.getpid()}.new")
    scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    scratch.replace(path)


def _read(path: Path, problems: list[str], place: str = "") -> dict[str, Any] | None:
    place = place or path.name
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        problems.append(f"{place}: {reason}")
        return None
    if not isinstance(tree, dict):
        problems.append(f"{place}: expected an object, got {type(tree).__name__}")
        return None
    return tree


def _fits(key: str, value: Any, problems: list[str]) -> bool:
    """Whether a value of comparison.json is of the kind that its readers take; another is a problem, and left out."""
    kind, expected = _HEAD_KINDS.get(key, (object, ""))
    good = value is None or (isinstance(value, kind) and not (kind is not object and isinstance(value, bool)))
    if key == "equal":
        good, expected = value in BUDGETS, " or ".join(BUDGETS)
    if not good:
        problems.append(f"{HEAD}: {key}: expected {expected}, got {value!r:.60}")
    return good


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """As JSON holds it: no NaN or infinity (null), whole floats as integers (per_row is mostly 0 and 1)."""
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
    """A point of a curve; null is what `_plain` made of a loss that was no number any more."""
    return [math.nan if value is None else value for value in point]


def _names(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


def _known(kind: type, tree: Any, where: str, required: Sequence[str]) -> dict[str, Any]:
    """The tree's values for the fields of `kind`; null means a field's default. Raises ValueError."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(tree).__name__}")
    missing = [name for name in required if tree.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    found: dict[str, Any] = {}
    for item in fields(kind):
        value = tree.get(item.name)
        if value is None:
            continue
        expected = _KINDS.get(str(item.type).partition("[")[0].partition(" |")[0])
        if expected and (not isinstance(value, expected[0]) or isinstance(value, bool)):
            raise ValueError(f"{where}.{item.name}: expected {expected[1]}, got {value!r:.60}")
        found[item.name] = float(value) if item.type == "float" else value
    return found


_HEAD_KINDS: dict[str, tuple[Any, str]] = {
    **{key: (str, "text") for key in ("name", "title", "baseline")},
    **{key: (dict, "an object") for key in ("spec", "provenance")},
    **{"labels": (list, "a list"), "seconds": ((int, float), "a number")},
}
_KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "dict": (Mapping, "an object"),
}
