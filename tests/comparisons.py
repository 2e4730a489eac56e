"""Comparisons as `pedro compare` leaves them on disk, made from a model of rows and seeds instead of from training.

A row has its own difficulty and a method its skill; a run adds what its seed does. So methods differ, or do not, by
construction, and scores of different methods on the same rows go together as real ones do.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pedro.comparison.report import WIDTH, make_report, print_report
from pedro.comparison.result_model import AVERAGE, Comparison, RunResult, Table, TableEntry, TaskResult
from pedro.comparison.run_files import write_run
from pedro.comparison.tables import build_tables, select
from pedro.provenance import provenance

GELU_LIKE = {"a": [-0.00407, 0.5, 0.42188, 0.12989, 0.01796, 0.0011, 2e-05], "b": [0.0, 0.259784, 0.0, 0.00219, 0.0]}


def result(
    label: str,
    task: str,
    seed: int,
    per_row: Sequence[float] | np.ndarray = (),
    *,
    majority: float | None = 0.5,
    parameters: int = 20_000,
    budget: int | None = None,
    created: str = "2025-01-01T00:00:00Z",
    **changes: object,
) -> RunResult:
    """A finished run with these rows, or a failed one without any."""
    name = label.lower().replace(" ", "-")
    score = TaskResult(
        task=task,
        metric="accuracy",
        value=float(np.mean(per_row)) if len(per_row) else 0.0,
        rows=len(per_row),
        majority=majority,
        per_row=tuple(map(float, per_row)),
    )
    values: dict[str, object] = {
        "id": f"{zlib.crc32(f'{label} {task} {seed} {budget} {created}'.encode()):016x}",
        "stage": "final",
        "comparison": "made",
        "method": name,
        "label": label,
        "options": {"r": 4},
        "task": task,
        "wording": "short",
        "backbone": "stories260K",
        "budget": budget,
        "seed": seed,
        "lr": 0.003,
        "training": {"batch_size": 16, "max_steps": 150, "lr": 0.003, "seed": seed},
        "state": "finished" if len(per_row) else "failed",
        "message": "" if len(per_row) else "training: the loss is nan at step 30; lower training.lr (0.003)",
        "scores": (score,) if len(per_row) else (),
        "validation": {"metric": "accuracy", "value": score.value, "loss": 0.4, "rows": 200} if len(per_row) else {},
        "trainable_parameters": parameters,
        "trainable_without_bias": parameters - 100,
        "adapter_bytes": 4 * parameters,
        "steps": 150,
        "optimizer_steps": 180 if name == "pedro" else 150,
        "best_step": 150,
        "tokens": 100_000,
        "seconds": 12.5,
        "scoring_seconds": 3.25,
        "tokens_per_second": 8000.5,
        "peak_memory_bytes": 2**29,
        "curves": {"train/loss": [[1, 2.5], [150, 0.4]], "dev/loss": [[50, 0.9], [150, 0.5]]},
        "activations": {"kind": "rational", "layers": _layers(seed, task)} if name == "pedro" else None,
        "provenance": {**provenance(), "created": created},
    }
    return RunResult(**{**values, **changes})  # type: ignore[arg-type]


def rows_of(task: str, seed: int, skill: float, rows: int = 400, spread: float = 0.15, label: str = "") -> np.ndarray:
    """0 or 1 for each row: one run of a method of this skill (0 is right half of the time, 1 about 65 %)."""
    difficulty = np.random.default_rng(zlib.crc32(task.encode())).normal(0, 1.5, rows)
    random = np.random.default_rng(zlib.crc32(f"{task} {seed} {label}".encode()))
    chance = 1 / (1 + np.exp(difficulty - skill - random.normal(0, spread)))
    return (random.random(rows) < chance).astype(float)


def write_comparison(folder: Path, results: Sequence[RunResult], **metadata: object) -> Path:
    """The folder of a comparison that holds these runs."""
    tasks = list(dict.fromkeys(result.task for result in results))
    labels = list(dict.fromkeys(result.label for result in results))
    tree = {
        "schema": 1,
        "name": "made",
        "title": "Methods on made-up rows",
        "equal": "compute",
        "baseline": labels[0] if labels else "",
        "labels": labels,
        "spec": {
            "backbones": ["stories260K"],
            "tasks": [{"task": task, "wording": "short"} for task in tasks],
            "methods": [{"name": label.lower().replace(" ", "-"), "label": label} for label in labels],
            "budgets": sorted({result.budget for result in results if result.budget}),
            "seeds": sorted({result.seed for result in results}),
            "tune": {"lr": [0.001, 0.003, 0.01, 0.03], "seed": 0, "once": False},
        },
        "paper": None,
        "provenance": provenance(),
        **metadata,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(tree))
    for item in results:
        write_run(folder, item)
    return folder


def whole(
    folder: Path, skills: Mapping[str, float], tasks: Mapping[str, float], seeds: int = 3, rows: int = 400
) -> Path:
    """Methods of these skills × tasks, of which each takes its share of a method's skill: nothing is learned at 0."""
    results = [
        result(label, task, seed, rows_of(task, seed, share * skill, rows, label=label), parameters=18_000 + 700 * at)
        for at, (label, skill) in enumerate(skills.items())
        for task, share in tasks.items()
        for seed in range(seeds)
    ]
    return write_comparison(folder, results)


def _layers(seed: int, task: str) -> list[dict[str, list[float]]]:
    random = np.random.default_rng(zlib.crc32(f"{task} {seed}".encode()))
    return [
        {name: [value * (1 + 0.1 * layer * random.normal()) for value in values] for name, values in GELU_LIKE.items()}
        for layer in range(5)
    ]


def tables_of(comparison: Comparison, **only: Sequence[str] | None) -> list[Table]:
    """The comparison's tables."""
    return build_tables(select(comparison), **only)


def entries_of(comparison: Comparison, **only: Sequence[str] | None) -> list[TableEntry]:
    """The entries of all of its tables; averages are none of them."""
    tables = tables_of(comparison, **only)
    return [entry for table in tables for entry in table.entries.values() if entry.task != AVERAGE]


def printed(comparison: Comparison, width: int = WIDTH, ansi: bool = False) -> str:
    """What `pedro compare` prints."""
    return print_report(make_report(comparison), width=width, ansi=ansi)
