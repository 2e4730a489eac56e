"""What a backbone in fewer bits costs and saves while an adapter is trained over it: float32, bfloat16, int8, nf4.

Each has a process of its own, which loads, trains, validates once at the end, and counts the memory that this takes it
beside its libraries. All have the same rows, seed and steps, so that their last validations can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool
from jobs.benchmarks.report import BenchmarkReport
from jobs.benchmarks.training import Load, setup_of
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

METHOD = "pedro"
BACKBONES = ("pedro-nano", "smollm2-135m")
LOADS = {"pedro-nano": Load(16, 120, 1, 64)}
LARGE = Load(8, 24, 1, 32)
WEIGHTS = {  # as results call them: what a spec's `training` says
    "float32": {"precision": "fp32"},
    "bfloat16": {"precision": "bf16"},
    "int8": {"precision": "fp32", "backbone_dtype": "int8"},
    "nf4": {"precision": "fp32", "backbone_dtype": "nf4"},
}


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each backbone in turn; `--quick` takes few steps of pedro-nano."""
    quick = options.quick
    loads: dict[str, Any] = {}
    settings = {"threads": options.threads, "loads": loads, "lr": 1e-4}
    report = BenchmarkReport("quantised", settings)
    for name in options.backbones or (BACKBONES[:1] if quick else BACKBONES):
        load = LOADS.get(name, LARGE)
        load = Load(load.batch, 4, load.joined, load.batch) if quick else load
        try:
            setup = setup_of(name, load)
        except BackboneError as error:
            report.skipped[name] = error.message
            log(f"  skipped {name}: {error.message}")
            continue
        loads[name] = vars(load)
        setup |= {"threads": options.threads, "batch": load.batch, "steps": load.steps, "method": METHOD}
        report.rows += _rows(name, setup, log)
    return report


def _rows(name: str, setup: dict[str, Any], log: Log) -> list[dict[str, Any]]:
    """A line for each kind of weights; steps beside those of float32."""
    rows: list[dict[str, Any]] = []
    for weights, training in WEIGHTS.items():
        with EnginePool(log) as pool:
            threads = {"OMP_NUM_THREADS": str(setup["threads"])}
            pool.start(weights, "train-quantised", {**setup, "training": training}, **threads)
            pool.wait()
            found = pool.run(weights, {})
        rows.append(
            {
                "backbone": name,
                "method": setup["method"],
                "weights": weights,
                **{f"{part}_mb": round(found[part] / 1e6, 1) for part in ("weights", "loaded", "peak")},
                "step_ms": round(1000 * found["step_s"], 1),
                "loss": round(found["loss"], 4),
            }
        )
        rows[-1]["step_ratio"] = round(rows[-1]["step_ms"] / rows[0]["step_ms"], 3)
        log(f"  {rows[-1]}")
    return rows
