"""Training metrics in a job's events, under the names of OpenAI's API."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {  # our curves: their names
    "train/loss": "train_loss",
    "train/token_accuracy": "train_mean_token_accuracy",
    "dev/loss": "valid_loss",
    "dev/token_accuracy": "valid_mean_token_accuracy",
}
PAIRS = {  # of preference tuning, for which they define none
    f"{split}/{measure}": f"{theirs}_{measure}"
    for split, theirs in (("train", "train"), ("dev", "valid"))
    for measure in ("reward_accuracy", "reward_margin")
}
WORDS = {"train": "training", "valid": "validation"}
IN_FILE = {"train_mean_token_accuracy": "train_accuracy"}  # different names in the result file
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
OF_RESULT = {  # a job's metrics as those of its best checkpoint; each validation uses all validation rows
    "train_loss": "train_loss",
    "train_mean_token_accuracy": "train_token_accuracy",
    "valid_loss": "validation_loss",
    "valid_mean_token_accuracy": "validation_token_accuracy",
    "full_valid_loss": "validation_loss",
    "full_valid_mean_token_accuracy": "validation_token_accuracy",
    "full_valid_reward_accuracy": "preference_accuracy",
}


@dataclass(frozen=True)
class MetricsEvent:
    message: str
    data: dict[str, Any]


def metrics_event(step: int, values: Mapping[str, float]) -> MetricsEvent | None:
    """The event of a point of the curves; None for a point without a loss."""
    names = {**NAMES, **PAIRS}
    told = {theirs: values[ours] for ours, theirs in names.items() if ours in values and math.isfinite(values[ours])}
    if told.keys().isdisjoint(NAMES.values()):
        return None
    words = ", ".join(f"{_words(name)}={value:.4f}" for name, value in told.items())
    return MetricsEvent(f"Step {step:,}: {words}", {"step": step, **told})


def checkpoint_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A job's metrics as those of its best checkpoint: the step and its measurements."""
    told = {theirs: metrics[ours] for theirs, ours in OF_RESULT.items() if ours in metrics}
    return {"step": metrics.get("best_step", 0), **told}


def measured_at(step: int, values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an intermediate checkpoint, from the curves' last values."""
    told = {theirs: values[ours] for ours, theirs in {**NAMES, **PAIRS}.items() if ours in values}
    full = {f"full_{name}": value for name, value in told.items() if name.startswith("valid_")}
    return {"step": step, **told, **full}


def step_metrics(points: Iterable[Mapping[str, Any]]) -> str:
    """The result file: CSV, one line per step in order; for steps repeated after a loss, the last values."""
    steps: dict[int, dict[str, Any]] = {}
    known = (*COLUMNS, *PAIRS.values())
    for point in points:
        named = {IN_FILE.get(name, name): value for name, value in point.items()}
        steps.setdefault(int(point["step"]), {}).update({name: named[name] for name in known if name in named})
    present = [name for name in known if name in COLUMNS or any(name in values for values in steps.values())]
    text = io.StringIO()
    writer = csv.DictWriter(text, present, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps))
    return text.getvalue()


def _words(name: str) -> str:
    split, _, measure = name.partition("_")
    return f"{WORDS[split]} {measure.replace('_', ' ')}"
