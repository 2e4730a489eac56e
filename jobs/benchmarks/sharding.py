"""What ZeRO-3 saves: two workers train on 300 M random parameters with stage 0 and with stage 3.

Both stages have the same batch and gradient checkpointing. Counted is the most memory that loading, steps, a
validation, a checkpoint and the saving take a worker beside its libraries; beside it stands what the dry run promises
for its tensors. Pages of the backbone's files, which workers of one machine share where they map them,
are part of a worker's peak, as they would be on a machine of its own; `both_mb` shares them out.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool
from jobs.benchmarks.model_sizes import ModelSize, bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.training import Load, random_backbone, row_files

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

SIZE = ModelSize("300M", "313 M", 1024, 24, 16, 16, 2816, True, vocab=4096)
QUICK = ModelSize("65M", "65 M", 512, 20, 8, 8, 1376, True, vocab=4096)
WORKERS, STAGES = 2, (0, 3)
CHECKPOINTED = {"gradient_checkpointing": True}
MOST, PROMISE_WITHIN = 0.6, 0.15


def run(options: Options, log: Log) -> BenchmarkReport:
    """Both stages, one after the other; `--quick` takes 65 M parameters."""
    size = QUICK if options.quick else SIZE
    load = Load(batch=4, steps=2, joined=2, held_out=4)
    folder = bench_folder() / "training" / size.name
    setup = {
        "backbone": str(random_backbone(size, folder / "backbone")),
        **row_files(folder, load),
        "batch": load.batch,
        "steps": load.steps,
        "method": "pedro",
        "training": CHECKPOINTED,
    }
    report = BenchmarkReport("sharding", {"backbone": size.title, "workers": WORKERS, **vars(load), **CHECKPOINTED})
    for stage in STAGES:
        found = measure({**setup, "resources": {"workers": WORKERS, "zero_stage": stage}}, log)
        report.rows.append({"stage": stage, "method": setup["method"], **found})
    whole, sharded = (row["peak_mb"] for row in report.rows)
    report.rows[1]["ratio"] = round(sharded / whole, 4)
    report.targets.append(Target(f"peak of stage 3 / stage 0, {size.title}", MOST, exactly(sharded / whole), True))
    for row in report.rows:
        off = exactly(abs(row["off"]))
        report.targets.append(Target(f"promise of stage {row['stage']} off by", PROMISE_WITHIN, off, at_most=True))
    return report


def measure(setup: dict[str, Any], log: Log) -> dict[str, Any]:
    """The peak of the worker that took most, in MB, beside the dry run's promise."""
    from jobs.benchmarks.workers.train import spec_of
    from pedro.training.estimate import dry_run

    plain = spec_of(setup, setup["method"])
    training = {**plain.training.to_dict(), **setup["training"]}
    spec = plain.model_validate({**plain.to_dict(), "resources": setup["resources"], "training": training})
    parts = dry_run(spec, calibrated=False).memory_bytes
    with tempfile.TemporaryDirectory() as folder, EnginePool(log) as pool:
        names = [f"train-group-{rank}" for rank in range(WORKERS)]
        for rank, name in enumerate(names):
            pool.start(name, "train-group", {**setup, "rank": rank, "group": str(Path(folder) / "group")})
        pool.wait()
        for name in names:
            pool.send(name, {})
        found = [pool.receive(name) for name in names]
    peak, promised = max(one["peak"] for one in found), sum(parts.values())
    log(f"  {setup['resources']}: peak {peak / 1e6:,.0f} MB, promised {promised / 1e6:,.0f}, {found}")
    return {
        "peak_mb": _mb(peak),
        "peaks_mb": [_mb(one["peak"]) for one in found],
        "of_files_mb": [_mb(one["mapped"]) for one in found],
        "both_mb": _mb(sum(one["fair"] for one in found)),
        "process_mb": _mb(max(one["process"] for one in found)),
        "loaded_mb": _mb(max(one["loaded"] for one in found)),
        "promised_mb": _mb(promised),
        "promised_parts_mb": {name: _mb(size) for name, size in parts.items()},
        "off": round(promised / peak - 1, 4),
        "step_s": round(max(one["step_s"] for one in found), 3),
        "loss": round(found[0]["loss"], 5),
    }


def _mb(size: float) -> float:
    return round(size / 1e6, 1)
