"""Memory over 10,000 requests. Resident set of a process that serves short requests of 64 tenants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks.bench_engine import BenchEngine, use_threads
from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target, exactly

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

TENANTS, PROMPT, NEW, SLOTS = 64, 16, 4, 32
GROWTH_MB = 16.0  # what an allocator may still gather; a leak of 2 kB a request would show as 20


def run(options: Options, log: Log) -> BenchmarkReport:
    """Serve in tenths and note the resident set after each; growth counts from the first tenth on."""
    use_threads(options.threads)
    requests = 1000 if options.quick else 10_000
    report = BenchmarkReport("memory", {"requests": requests, "prompt": PROMPT, "new": NEW, "tenants": TENANTS})
    for name in options.models or ("S",):
        size = MODEL_SIZES[name]
        engine = BenchEngine(size, options.device, max_batch=SLOTS, max_length=64)
        refs = [str(path) for path in adapter_directories(size, "pedro", TENANTS)]
        sizes = []
        for tenth in range(10):
            asked = prompts(size, requests // 10, PROMPT, tenth)
            engine.answer(asked, [refs[i % TENANTS] for i in range(len(asked))], NEW)
            sizes.append(resident_mb())
            log(f"  {name}: {(tenth + 1) * requests // 10:,} requests, {sizes[-1]:.1f} MB")
            row = {"case": "served", "engine": "ours", "adapters": "pedro", "model": name, "tenants": TENANTS}
            row |= {"requests": (tenth + 1) * requests // 10, "rss_mb": round(sizes[-1], 1)}
            report.rows.append({**row, "growth_mb": round(sizes[-1] - sizes[0], 2)})
        engine.close()
        growth = exactly(sizes[-1] - sizes[0])
        name_ = f"{name}: MB gained from {requests // 10:,} to {requests:,} requests"
        report.targets.append(Target(name_, GROWTH_MB, growth, at_most=True))
    return report


def resident_mb() -> float:
    """This process's resident set in MB (2^20 bytes)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
