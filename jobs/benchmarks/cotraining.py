"""Eight small fine-tunes of one backbone and method in one group, beside the same eight one after the other.

Tokens per second of all eight, both ways in one process and in turn. `--batches` are the rows of a job's batch: the
fewer, the more of a lone job's step is not arithmetic, and the more a group saves.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING

from jobs.benchmarks.engine_process import EnginePool
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio
from jobs.benchmarks.training import Load, setup_of
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

JOBS = 8
METHODS = ("pedro", "lora", "ia3")
BATCHES = (1, 4, 16)
SMALL = 4  # rows of a small job's batch
LOAD = Load(batch=SMALL, steps=40, joined=1, held_out=8)
GAIN = 1.8


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each method and batch; `--quick` is PEDRO with the smallest two batches in short runs."""
    quick = options.quick
    rounds = options.rounds or (2 if quick else 7)
    load = replace(LOAD, steps=8) if quick else LOAD
    report = BenchmarkReport("cotraining", {"rounds": rounds, "threads": 1, "jobs": JOBS, **vars(load)})
    for name in options.backbones or ("pedro-nano",):
        for method in METHODS[:1] if quick else METHODS:
            for batch in options.batches or (BATCHES[:2] if quick else BATCHES):
                try:
                    _measure(report, name, method, replace(load, batch=batch), rounds, log)
                except BackboneError as error:
                    report.skipped[name] = error.message
    return report


def _measure(report: BenchmarkReport, name: str, method: str, load: Load, rounds: int, log: Log) -> None:
    setup = {**setup_of(name, load), "threads": 1, "batch": load.batch, "steps": load.steps}
    with EnginePool(log) as pool:
        pool.start("together", "train-together", {**setup, "method": method, "jobs": JOBS}, OMP_NUM_THREADS="1")
        if "together" not in pool.wait():
            report.skipped |= pool.skipped
            return
        runs = pool.in_turn("together", "together", rounds)
    together, alone = ([figures["tok_s"] for figures in runs[on]] for on in (True, False))
    ratio = paired_ratio(together, alone)
    row = {
        "backbone": name,
        "method": method,
        "batch": load.batch,
        "tok_s": round(median(together), 1),
        "alone_tok_s": round(median(alone), 1),
        "ratio": round(ratio.value, 4),
        "ratio_interval": ratio.interval,
    }
    report.rows.append(row)
    log(f"  {row}")
    if load.batch == SMALL:
        report.targets.append(Target(f"{name}: 8 {method} jobs of {SMALL} rows, together / apart", GAIN, ratio))
