"""What a job's events say of its training, under the names of OpenAI's API."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {"train/loss": "train_loss", "dev/loss": "valid_loss"}  # of our curves: theirs
PAIRS = {  # of preference tuning, for which they name none
    f"{split}/{measure}": f"{theirs}_{measure}"
    for split, theirs in (("train", "train"), ("dev", "valid"))
    for measure in ("reward_accuracy", "reward_margin")
}
WORDS = {"train": "training", "valid": "validation"}
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class MetricsEvent:
    message: str
    data: dict[str, Any]


def metrics_event(step: int, values: Mapping[str, float]) -> MetricsEvent | None:
    """The event of a point of the curves; None for a point that has no loss."""
    names = {**NAMES, **PAIRS}
    told = {theirs: values[ours] for ours, theirs in names.items() if ours in values and math.isfinite(values[ours])}
    if told.keys().isdisjoint(NAMES.values()):
        return None
    words = ", ".join(f"{_words(name)}={value:.4f}" for name, value in told.items())
    return MetricsEvent(f"Step {step:,}: {words}", {"step": step, **told})


def checkpoint_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """A job's metrics as those of its best checkpoint: the step, and on validation and test rows what was measured."""
    told = {"step": metrics.get("best_step", 0)}
    measured = (("valid_loss", "validation_loss"), ("full_valid_loss", "loss"))
    for theirs, ours in (*measured, ("full_valid_reward_accuracy", "preference_accuracy")):
        if ours in metrics:
            told[theirs] = metrics[ours]
    return told


def step_metrics(points: Iterable[Mapping[str, Any]]) -> str:
    """The result file: CSV, a line a step in order; of a step that was repeated after a loss, what came last."""
    steps: dict[int, dict[str, Any]] = {}
    known = (*COLUMNS, *PAIRS.values())
    for point in points:
        steps.setdefault(int(point["step"]), {}).update({name: point[name] for name in known if name in point})
    present = [name for name in known if name in COLUMNS or any(name in values for values in steps.values())]
    text = io.StringIO()
    writer = csv.DictWriter(text, present, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps))
    return text.getvalue()


def _words(name: str) -> str:
    split, _, measure = name.partition("_")
    return f"{WORDS[split]} {measure.replace('_', ' ')}"
