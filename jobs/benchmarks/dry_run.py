"""What a dry run promises beside what the job then takes: time and memory of a real `pedro submit`, on each backbone.

Each promise is made by a process of its own, as a user's is; each job runs alone on a local Ray head with a home of its
own. The promise of time is of the whole job, that of memory the peak of its worker.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.model_sizes import bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.backbone import embedded_backbones, resolve_backbone
from pedro.config import Settings
from pedro.errors import PedroError
from pedro.spec_reader import validate_spec
from pedro.training.spec import FineTuneSpec

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from pedro.store import Store

COLUMNS = ("backbone", "method", "what", "promised", "measured", "off", "time_from")
TIME_WITHIN, MEMORY_WITHIN = 0.30, 0.15
STEPS, QUICK_STEPS = 120, 20
TRAINING = {"batch_size": 16, "lr": 3e-3, "theta_lr": 1e-4, "theta_every": 5, "patience": 1000}


def run(options: Options, log: Log) -> BenchmarkReport:
    """Promise and job of every backbone; without names, of those that the package carries."""
    from pedro.cluster import connect
    from pedro.serving.deploy import end
    from pedro.store import Store
    from pedro.training.queue.process import end_controller

    steps = QUICK_STEPS if options.quick else STEPS
    report = BenchmarkReport("dryrun", {"steps": steps, **TRAINING, "threads": 1})
    named = {name: str(resolve_backbone(name).directory) for name in options.backbones or embedded_backbones()}
    home = bench_folder() / "dryrun"
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    try:
        end_controller(settings)  # of a run that was killed
        end(settings)
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        connect(settings, log)
        store = Store(settings.database_url)
        for name, directory in named.items():
            for method in ("pedro", "lora"):
                spec = _spec(method, directory, steps)
                promised = _promise(spec, home)
                measured = _job(spec, settings, store, log)
                _compare(report, name, method, promised, measured, log)
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        end_controller(settings)
        end(settings)
        shutil.rmtree(home, ignore_errors=True)
    return report


def _spec(method: str, backbone: str, steps: int) -> FineTuneSpec:
    fields = {
        "tenant": "bench",
        "adapter": method,
        "backbone": backbone,
        "data": {"train": "pedro://demo/acme/train.jsonl", "test": "pedro://demo/acme/test.jsonl"},
        "method": {"name": method},
        "training": {**TRAINING, "max_steps": steps, "eval_every": max(1, steps // 4)},
        "gate": {"max_rows": 200},
    }
    return validate_spec(fields, FineTuneSpec, source=f"bench.{method}").located(Path.cwd())


def _promise(spec: FineTuneSpec, home: Path) -> dict[str, Any]:
    """What `pedro submit --dry-run` says. Raises PedroError with its own words if it fails."""
    program = (
        "import json, sys; from pedro.spec_reader import validate_spec; from pedro.training.estimate import dry_run"
    )
    program += "; from pedro.training.spec import FineTuneSpec"
    program += "; spec = validate_spec(json.load(sys.stdin), FineTuneSpec, source='bench')"
    program += "; print(json.dumps(dry_run(spec).to_dict()))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(spec.to_dict()),
        env={**os.environ, "PEDRO_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PedroError(f"the dry run ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _job(spec: FineTuneSpec, settings: Settings, store: Store, log: Log) -> dict[str, float]:
    """Seconds of the whole job and of its training, and the peak of its worker's memory in bytes."""
    from pedro.registry import Registry
    from pedro.registry.queries import find_run_of_job
    from pedro.training.submit import submit, wait

    result = wait(submit(spec, settings, store), settings, store)
    tracked = find_run_of_job(Registry.open(settings), spec.name, result.job_id)
    peak = tracked.metrics.get("system/peak_memory_mb", 0.0) if tracked else 0.0
    log(f"  {result.model}: {result.seconds:.0f} s, {peak:,.0f} MB")
    return {"job s": result.seconds, "training s": result.metrics["seconds"], "memory MB": peak}


def _compare(
    report: BenchmarkReport, name: str, method: str, promise: dict[str, Any], measured: dict[str, float], log: Log
) -> None:
    parts = promise["seconds_by_part"]
    promised = {
        "job s": promise["seconds"],
        "training s": parts["of steps"] + parts["of validation"],
        "memory MB": (sum(promise["memory_bytes"].values()) + promise["process_bytes"]) / 2**20,
    }
    for what, value in promised.items():
        off = value / measured[what] - 1 if measured[what] else float("nan")
        within = MEMORY_WITHIN if what == "memory MB" else TIME_WITHIN
        row = {"backbone": name, "method": method, "what": what, "promised": round(value, 1)}
        report.rows.append(
            {**row, "measured": round(measured[what], 1), "off": round(off, 3), "time_from": promise["time_from"]}
        )
        log(f"  {name}, {method}: {what}: promised {value:,.1f}, measured {measured[what]:,.1f} ({off:+.0%})")
        report.targets.append(Target(f"{name}, {method}: {what} off by", within, exactly(abs(off)), at_most=True))
