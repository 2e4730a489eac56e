"""Cold start: from the start of a fresh process to the engine's first token. `main` is that process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from statistics import median
from typing import TYPE_CHECKING

from jobs.benchmarks.engine_process import Log, python_path
from jobs.benchmarks.model_sizes import MODEL_SIZES, PROMPT_TOKENS, prompts, saved_model
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import spread

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options

LIMIT_S = 10.0


def run(options: Options, log: Log) -> BenchmarkReport:
    """Start, load the backbone from disk, answer one token of a request with an adapter; several times."""
    from jobs.benchmarks.random_adapters import adapter_directories

    rounds = options.rounds or (1 if options.quick else 5)
    report = BenchmarkReport("coldstart", {"rounds": rounds, "threads": options.threads})
    for name in options.models or ("S",):
        directory, adapter = saved_model(MODEL_SIZES[name]), adapter_directories(MODEL_SIZES[name], "pedro", 1)[0]
        arguments = [name, str(directory), str(adapter), options.device, str(options.threads)]
        env = {**os.environ, "PYTHONPATH": python_path()}
        seconds = []
        for number in range(rounds):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", __name__, *arguments], env=env, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
            log(f"  {name}: start {number + 1} of {rounds}: {seconds[-1]:.1f} s")
        taken = spread(seconds)
        report.rows.append(
            {
                "case": "process start to first token",
                "engine": "ours",
                "adapters": "pedro",
                "model": name,
                "seconds": round(median(seconds), 2),
                "interval": taken.interval,
            }
        )
        if name == "S":
            report.targets.append(Target("S: process start to first token, seconds", LIMIT_S, taken, at_most=True))
    return report


def main(name: str, directory: str, adapter: str, device: str, threads: str) -> None:
    """Load and answer, as a serving process does, and end."""
    os.environ["OMP_NUM_THREADS"] = threads
    from jobs.benchmarks.bench_engine import BenchEngine, use_threads
    from jobs.benchmarks.model_sizes import default_dtype
    from pedro.backbone import load_model, resolve_backbone

    use_threads(int(threads))
    model = load_model(resolve_backbone(directory), default_dtype(device), device)
    engine = BenchEngine(MODEL_SIZES[name], device, model=model, max_batch=32, max_length=512)
    engine.answer(prompts(MODEL_SIZES[name], 1, PROMPT_TOKENS, 0), [adapter], 1)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
