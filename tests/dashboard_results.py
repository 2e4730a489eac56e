"""Jobs, sweeps and comparisons as their real writers leave them, with made-up numbers. No page is involved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.comparison.kept_rows import AnsweredRow, AnsweredTask, write_rows
from pedro.comparison.result_model import RunResult
from pedro.comparison.run_files import read_comparison, write_run
from pedro.registry import Registry
from pedro.store import Store
from pedro.training.sweep.records import Records, SweepRecord, Trial, TrialOutcome, TrialState

if TYPE_CHECKING:
    from pedro.config import Settings

METHODS = (
    ("pedro", "PEDRO", {"r": 12}, 20260, 0.06),
    ("lora", "LoRA", {"r": 4}, 21120, 0.02),
    ("ia3", "(IA)³", {"r": 16}, 19210, -0.05),
    ("bitfit", "BitFit", {"r": 8}, 20480, -0.09),
)
TASKS = (("sst2", "Sentiment of a sentence", 0.62, 0.51), ("snips", "Intent of a voice command", 0.78, 0.16))
SEEDS = (0, 1, 2)


def add_jobs(settings: Settings) -> None:
    """Three jobs that ended and one that was begun on a cluster that is gone."""
    store = Store(settings.database_url)
    for number, (status, message) in enumerate(
        [("succeeded", ""), ("failed", "training.lr: the loss is NaN"), ("cancelled", "stopped")]
    ):
        job = store.create_job("acme", "intents", {"method": {"name": "pedro"}}, f"ftjob-{number}")
        store.update_job(job.id, status="running", submission_id=job.id)
        result = {"model": "acme.intents:2", "metrics": {"accuracy": 0.93}, "gate": "accuracy 0.93: better by 0.22"}
        store.update_job(job.id, status=status, message=message, result=result if status == "succeeded" else None)
    lost = store.create_job("globex", "topics", {}, "ftjob-lost")
    store.update_job(lost.id, status="running", submission_id=lost.id)
    store.close()


def add_running_job(settings: Settings, job_id: str = "ftjob-live") -> str:
    """A job that waits for the cluster, whose run has curves already; the run's id."""
    store = Store(settings.database_url)
    store.create_job("acme", "intents", {}, job_id)
    store.close()
    registry = Registry.open(settings)
    run = registry.start_run(experiment="acme.intents", name=job_id, params={}, tags={"job": job_id})
    for step in range(10, 101, 10):
        registry.log_metrics(run, step, {"train/loss": 2 / step, "dev/loss": 2.2 / step})
    return run


def add_sweep(settings: Settings, sweep_id: str = "sweep-0123456789ab") -> Records:
    """Twelve trials over orders, r and the learning rate: most finished, one stopped, one failed, one under way."""
    records = Records(settings.storage, sweep_id)
    orders, rates = [[6, 5], [4, 3], [2, 1], [1, 0]], [1e-3, 3e-3, 1e-2]
    base = {"tenant": "acme", "adapter": "intents", "backbone": "stories260K", "data": {"train": "train.jsonl"}}
    space = {
        "method.orders": {"kind": "grid", "values": orders},
        "training.lr": {"kind": "grid", "values": rates},
        "method.r": {"kind": "choice", "values": [6, 12]},
    }
    records.write_record(SweepRecord(sweep_id, {"name": "orders", "base": base, "space": space, "search": {}}))
    for number in range(12):
        order, lr = orders[number % 4], rates[number // 4]
        loss = 0.4 + 0.08 * (6 - order[0]) / 5 + 0.2 * abs(math.log10(lr) + 2) + 0.01 * (number % 3)
        parameters = {"method.orders": order, "training.lr": lr, "method.r": 6 + 6 * (number % 2)}
        reports = tuple((step, loss + 20 / step) for step in range(50, 301, 50))
        state = {3: TrialState.STOPPED, 7: TrialState.FAILED, 11: TrialState.RUNNING}.get(number, TrialState.FINISHED)
        shown = reports[:2] if state is TrialState.STOPPED else reports
        records.write_trial(Trial(number, parameters, f"run{number}", state, reports=shown, steps=300))
        if state in (TrialState.FINISHED, TrialState.FAILED):
            metrics = {"validation_loss": loss, "accuracy": 1.2 - loss, "loss": loss, "steps": 300}
            failed = state is TrialState.FAILED
            message = "the loss is NaN" if failed else ""
            records.write_outcome(
                number, TrialOutcome(state, 1, message, "sha256:aa", {} if failed else metrics, 20260, None, 31.0)
            )
    return records


def add_comparison(folder: Path, name: str = "tiny_table1", budgets: tuple[int | None, ...] = (None,)) -> Path:
    """Four methods on two tasks with three seeds; BitFit diverges once. With budgets, each at every budget."""
    folder = folder / name
    folder.mkdir(parents=True)
    head = {
        "schema": 1,
        "name": name,
        "title": f"Four methods on stories260K ({name})",
        "equal": "compute",
        "baseline": "PEDRO",
        "spec": {
            "methods": [{"name": method} for method, *_ in METHODS],
            "tasks": [{"task": task} for task, *_ in TASKS],
            "backbones": ["stories260K"],
            "seeds": list(SEEDS),
            "budgets": None if budgets == (None,) else list(budgets),
        },
        "paper": None,
        "provenance": {"commit": "0123456", "created": "2026-11-20T12:00:00Z"},
    }
    (folder / "comparison.json").write_text(json.dumps(head))
    for described in METHODS:
        method, _, _, parameters, gain = described
        for asked in TASKS:
            task, _, base, _ = asked
            for budget in budgets:
                for seed in SEEDS:
                    count = budget or parameters
                    shift = gain + 0.03 * math.log10(count / 20000) + 0.01 * (seed - 1)
                    failed = (method, task, seed) == ("bitfit", "snips", 2)
                    score = None if failed else base + shift
                    write_run(folder, _result(name, described, asked, seed, budget, count, score))
    return folder


def add_rows(folder: Path) -> None:
    """The rows behind every score of a comparison, as the runs keep them."""
    for run in read_comparison(folder).runs:
        tasks = [
            AnsweredTask(
                score.task,
                tuple(
                    AnsweredRow(f"{score.task} {row}", "yes" if row % 2 else "no", "yes" if right else "?", right)
                    for row, right in enumerate(score.per_row)
                ),
            )
            for score in run.scores
        ]
        write_rows(folder, run.id, tasks)


def _result(
    name: str,
    described: tuple[str, str, dict[str, Any], int, float],
    asked: tuple[str, str, float, float],
    seed: int,
    budget: int | None,
    count: int,
    score: float | None,
) -> RunResult:
    """A run of one of METHODS on one of TASKS; a failed one where there is no score."""
    (method, label, options, _, _), (task, title, _, majority) = described, asked
    rows = 200
    fields = {
        "id": f"{abs(hash_of(name, label, task, seed, budget)):016x}"[:16],
        "stage": "final",
        "comparison": name,
        "method": method,
        "label": label,
        "options": options,
        "task": task,
        "wording": "short",
        "title": title,
        "backbone": "stories260K",
        "budget": budget,
        "seed": seed,
        "lr": 0.01 if method == "pedro" else 0.003,
        "training": {"lr": 0.01 if method == "pedro" else 0.003, "batch_size": 16, "max_steps": 150, "seed": seed},
        "state": "failed" if score is None else "finished",
        "message": "the loss is NaN" if score is None else "",
        "provenance": {"commit": "0123456"},
    }
    if score is None:
        return RunResult.from_dict(fields)
    right = [1 if (row * 37) % rows < score * rows else 0 for row in range(rows)]
    value = sum(right) / rows
    score_of = {"task": task, "metric": "accuracy", "value": value, "parts": {"accuracy": value}, "rows": rows}
    points = range(25, 151, 25)
    return RunResult.from_dict(
        {
            **fields,
            "scores": [{**score_of, "majority": majority, "per_row": right}],
            "validation": {"metric": "accuracy", "value": value, "loss": 1 - value, "rows": 150},
            "trainable_parameters": count,
            "trainable_without_bias": count - 100,
            "adapter_bytes": 4 * count,
            "steps": 150,
            "optimizer_steps": 150,
            "best_step": 125,
            "tokens": 90000,
            "seconds": 20.0 + len(label),
            "scoring_seconds": 3.0,
            "tokens_per_second": 4000.0 + 100 * len(label),
            "answer_tokens_per_second": 400.0 + 10 * len(label),
            "peak_memory_bytes": 700 << 20,
            "curves": {
                "train/loss": [[step, 1 - value + 30 / step] for step in points],
                "dev/loss": [[step, 1 - value + 32 / step + (0.05 if step == 150 else 0)] for step in points],
            },
        }
    )


def hash_of(*parts: Any) -> int:
    """The same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8])
