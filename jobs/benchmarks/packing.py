"""Training without padding beside the same steps with it, both in one process and in turn.

A batch has the same rows both ways, drawn from all lengths, so that its padding is what its longest row makes of it. A
backbone that is too narrow to pack takes as long both ways.
"""

from __future__ import annotations

from itertools import islice
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool
from jobs.benchmarks.model_sizes import MODEL_SIZES, bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio
from jobs.benchmarks.training import ROWS, named, random_backbone
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

DATA = {"acme": "commands (SNIPS)", "globex-reader": "passages (SQuAD)"}
METHODS = ("pedro", "lora")
BATCH, HELD_OUT = 16, 16
BACKBONE = "S"  # as narrow as one may be that packs at all
STEPS = {"acme": 20, "globex-reader": 2}  # about as many tokens


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each backbone, method and data; `--quick` is PEDRO in short runs."""
    quick = options.quick
    rounds = options.rounds or (2 if quick else 7)
    report = BenchmarkReport("packing", {"rounds": rounds, "threads": options.threads, "batch": BATCH})
    for name in options.backbones or (BACKBONE,):
        for data in DATA:
            for method in METHODS[:1] if quick else METHODS:
                try:
                    setup = _setup(name, data, options.threads, max(2, STEPS[data] // 4) if quick else STEPS[data])
                except BackboneError as error:
                    report.skipped[name] = error.message
                    continue
                _measure(report, name, data, {**setup, "method": method}, rounds, log)
    return report


def _setup(name: str, data: str, threads: int, steps: int) -> dict[str, Any]:
    folder = bench_folder() / "packing" / name
    folder.mkdir(parents=True, exist_ok=True)
    directory = random_backbone(MODEL_SIZES[name], folder / "backbone") if name in MODEL_SIZES else named(name)
    files, held_out = ROWS.parent / data, folder / f"{data}.jsonl"
    with (files / "test.jsonl").open() as lines:
        held_out.write_text("".join(islice(lines, HELD_OUT)))
    rows = {"train": str(files / "train.jsonl"), "validation": str(held_out)}
    return {"backbone": str(directory), **rows, "threads": threads, "batch": BATCH, "steps": steps}


def _measure(report: BenchmarkReport, name: str, data: str, setup: dict[str, Any], rounds: int, log: Log) -> None:
    with EnginePool(log) as pool:
        pool.start("both", "train-packing", setup, OMP_NUM_THREADS=str(setup["threads"]))
        if "both" not in pool.wait():
            report.skipped |= pool.skipped
            return
        runs = pool.in_turn("both", "packing", rounds)
    packed, padded = ([figures["tok_s"] for figures in runs[packing]] for packing in (True, False))
    ratio = paired_ratio(packed, padded)
    row = {
        "backbone": name,
        "data": data,
        "method": setup["method"],
        "padding": round(runs[True][0]["padding"], 3),
        "tok_s": round(median(packed), 1),
        "padded_tok_s": round(median(padded), 1),
        "ratio": round(ratio.value, 4),
        "ratio_interval": ratio.interval,
    }
    report.rows.append(row)
    log(f"  {row}")
    report.targets.append(Target(f"{name}: {setup['method']} on {DATA[data]}, packed / padded, tokens/s", 1.0, ratio))
