"""A sweep's output for users: a table while it runs, a table and a figure at its end."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.training.progress import clock
from pedro.training.sweep.records import Trial, TrialState

if TYPE_CHECKING:
    from pedro.training.sweep.tracker import TrialTracker

EVERY_S = 20.0
AT_MOST = 12  # trials in the table during the run
APART = 0.06  # minimum distance between ticks, as a share of the axis
SCORES = ("accuracy", "backbone_accuracy", "majority_accuracy", "loss")


class SweepProgress:
    """Prints the table when a trial ends, and periodically in between."""

    def __init__(self, tracker: TrialTracker, log: Callable[[str], None]) -> None:
        self._tracker, self._log = tracker, log
        self._started = time.monotonic()
        self._last: tuple[float, str] = (self._started, "")

    def show(self, changed: bool) -> None:
        """Print if something `changed` or if the last table is old."""
        now = time.monotonic()
        if not changed and now - self._last[0] < EVERY_S:
            return
        table = "\n".join(progress_table(self._tracker))
        if table != self._last[1]:
            self._log(f"{self._head(now - self._started)}\n{table}")
        self._last = (now, table)

    def _head(self, seconds: float) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in self._tracker.counts().items() if count)
        best = self._tracker.best
        leader = f" · best so far: trial {best.number}, validation loss {best.loss:.4f}" if best else ""
        return f"sweep {self._tracker.spec.name} · {counts} of {self._tracker.planner.total} · {clock(seconds)}{leader}"


def progress_table(tracker: TrialTracker) -> list[str]:
    """Lines of the running trials and, if not all fit, of the best others."""
    trials = tracker.trials
    if len(trials) > AT_MOST:
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        others = sorted(
            (t for t in trials if t.state is not TrialState.RUNNING), key=lambda t: (t.loss is None, t.loss)
        )
        trials = [*running, *others[: max(3, AT_MOST - len(running))]]
    rows = [
        [
            str(trial.number),
            trial.state.value,
            f"{trial.step:,}/{trial.steps:,}" if trial.steps else "-",
            _round(trial.loss),
            *(_value(value) for value in trial.parameters.values()),
        ]
        for trial in trials
    ]
    return aligned([["trial", "state", "step", "dev loss", *tracker.spec.space], *rows])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as columns of equal width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def rows_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One flat row per trial: number, state, parameters by key, scores, cost, why it ended.

    The validation loss is the kept checkpoint's, or the last one of a trial that did not finish.
    """
    return [
        {
            "trial": trial.number,
            "state": trial.state.value,
            **trial.parameters,
            "validation_loss": trial.loss,
            **{name: metric(trial, name) for name in SCORES},
            "trainable_parameters": trial.outcome.trainable_parameters if trial.outcome else None,
            "steps": metric(trial, "steps") or trial.step,
            "seconds": trial.outcome.seconds if trial.outcome else None,
            "message": trial.message,
            "run_id": trial.run_id,
        }
        for trial in trials
    ]


def write_sweep_report(tracker: TrialTracker, folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, trials.csv and, if any trial has a loss, parallel.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = rows_of(tracker.trials)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (folder / "trials.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["trial"])
        writer.writeheader()
        writer.writerows(rows)
    comparable = [
        t for t in tracker.trials if t.loss is not None and t.state not in (TrialState.FAILED, TrialState.LOST)
    ]
    if comparable:
        draw_parallel(comparable, list(tracker.spec.space), tracker.best, folder / "parallel.png")


def draw_parallel(drawn: Sequence[Trial], keys: list[str], best: Trial | None, path: Path) -> None:
    """Parallel coordinates: an axis per key, then validation loss and accuracy; a line per trial.

    Finished trials are coloured by loss and the best is drawn thick; stopped ones are grey; failed ones are omitted.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    columns = [(key, [trial.parameters[key] for trial in drawn]) for key in keys]
    columns.append(("validation loss", [trial.loss for trial in drawn]))
    if any(metric(trial, "accuracy") is not None for trial in drawn):
        columns.append(("accuracy", [metric(trial, "accuracy") for trial in drawn]))
    axes = [axis(values) for _, values in columns]
    figure = Figure(figsize=(2.2 * max(3, len(columns)), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    plot = figure.add_subplot()
    finished = [trial.loss for trial in drawn if trial.state is TrialState.FINISHED]
    losses = [loss for loss in finished or [trial.loss for trial in drawn] if loss is not None]
    shades = ScalarMappable(Normalize(min(losses), max(losses)), "viridis_r")
    for i, trial in enumerate(drawn):
        heights = [height(values[i]) for (_, values), (height, _) in zip(columns, axes, strict=True)]
        points = [(x, y) for x, y in enumerate(heights) if y is not None]
        done, winner = trial.state is TrialState.FINISHED, best is not None and trial.number == best.number
        plot.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=shades.to_rgba(np.array(trial.loss)) if done else "0.75",
            linewidth=3.5 if winner else 1.5 if done else 1.0,
            zorder=3 if winner else 2 if done else 1,
            marker="o",
            markersize=4,
        )
    for x, (_, ticks) in enumerate(axes):
        plot.axvline(x, color="0.3", linewidth=0.8, zorder=0)
        for y, text in ticks:
            plot.annotate(
                text,
                (x, y),
                textcoords="offset points",
                xytext=(-5, 0),
                ha="right",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )
    plot.set_xticks(range(len(columns)), [name for name, _ in columns], fontsize=9)
    plot.set_yticks([])
    plot.set_xlim(-0.5, len(columns) - 0.7)
    plot.spines[:].set_visible(False)
    figure.colorbar(shades, ax=plot, label="validation loss (finished trials)", fraction=0.03, pad=0.02)
    figure.savefig(path, dpi=150)


Height = Callable[[Any], float | None]


def axis(values: Sequence[Any]) -> tuple[Height, list[tuple[float, str]]]:
    """Positions of values between 0 and 1 on their axis, and its ticks.

    Numbers are placed by size (logarithmically over wide ranges), other values in order of appearance.
    """
    known = [value for value in values if value is not None]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
        names = list(dict.fromkeys(map(_value, known)))
        positions = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
        return (lambda value: None if value is None else positions[_value(value)]), [
            (y, n) for n, y in positions.items()
        ]
    low, high = min(known), max(known)
    wide = low > 0 and high / low >= 8
    scale: Callable[[float], float] = math.log if wide else float
    span = scale(high) - scale(low)

    def height(value: Any) -> float | None:
        return None if value is None else (scale(value) - scale(low)) / span if span else 0.5

    ticks: list[tuple[float, str]] = []
    middle = math.sqrt(low * high) if wide else (low + high) / 2
    for mark in [low, high, *sorted(set(known)), middle]:
        y = height(mark) or 0.0
        if all(abs(y - other) >= APART for other, _ in ticks):
            ticks.append((y, f"{mark:.4g}"))
    return height, ticks


def metric(trial: Trial, name: str) -> Any:
    """A finished trial's metrics."""
    return trial.outcome.metrics.get(name) if trial.outcome else None


def _round(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
