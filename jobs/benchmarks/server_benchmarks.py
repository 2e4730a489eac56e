"""The benchmarks that need the platform around the engine: HTTP, hot swap under load, what a failure costs.

Knows the platform from outside: a home of its own, registered versions of one adapter, keys, a local Ray head.
"""

from __future__ import annotations

import shutil
import time
from statistics import median
from typing import TYPE_CHECKING

from jobs.benchmarks import (
    batch_kill,
    canary,
    chat_server,
    control_plane,
    dashboard_pages,
    dry_run,
    fairness,
    fairness_http,
    http_overhead,
    outage,
    queue_kills,
    scaleout,
    soak,
    tenants_http,
)
from jobs.benchmarks.chaos import run as chaos_run
from jobs.benchmarks.command_line import Benchmark, Options
from jobs.benchmarks.demo_server import ADAPTER, MODEL, adapted, backbone_with_words, running_server
from jobs.benchmarks.engine_benchmarks import FAIRNESS_COLUMNS
from jobs.benchmarks.local_server import register_version
from jobs.benchmarks.model_sizes import MODEL_SIZES, PROMPT_TOKENS, bench_folder, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.backbone import resolve_backbone
from pedro.config import Settings

if TYPE_CHECKING:
    from jobs.benchmarks.engine_process import Log

REGISTRY_COLUMNS = (
    *("case", "median_ms", "longest_ms", "tenants", "requests", "tok_s", "ttft_ms", "ratio", "ratio_interval"),
)


def http_report(options: Options, log: Log) -> BenchmarkReport:
    """The cost of gateway and Serve."""
    with running_server(options, log) as running:
        return http_overhead.run(options, running.server, running.local.settings.home, log)


def fairness_report(options: Options, log: Log) -> BenchmarkReport:
    """Floods beside a quiet tenant: on the engine in process, then through the server."""
    report = fairness.run(options, log)
    with running_server(options, log) as running:
        fairness_http.add(report, options, running.server, running.local.key("other"), log)
    return report


def swap_report(options: Options, log: Log) -> BenchmarkReport:
    """An alias that moves under 32 streams: every 5 s for a minute, then every 0.5 s for 20 s."""
    from jobs.benchmarks.hot_swap import swap

    phases = ((1.0, 4.0), (0.5, 2.0)) if options.quick else ((5.0, 60.0), (0.5, 20.0))
    with running_server(options, log) as running:
        log(f"moving {running.server.model} " + ", ".join(f"every {every:g} s for {s:g} s" for every, s in phases))
        seen = swap(
            running.server.url,
            running.server.key,
            running.local.key("operator", "admin"),
            running.server.model,
            list(running.versions),
            streams=8 if options.quick else 32,
            phases=phases,
            prompts=prompts(MODEL_SIZES[running.server.size], 8, PROMPT_TOKENS, seed=0),
        )
    report = BenchmarkReport("swap", {"model": running.server.size, "phases": phases})
    for phase in seen["phases"]:
        first = phase["first_served_s"]
        row = {key: value for key, value in phase.items() if key != "first_served_s"}
        report.rows.append({**row, "first_served_s": first["max"]})
        label = f"moved every {phase['every_s']:g} s: "
        for name in ("failed", "mixed"):
            report.targets.append(Target(label + name, 0, exactly(float(phase[name])), at_most=True))
        if phase["every_s"] >= 1 and first["max"] is not None:
            report.targets.append(Target(label + "s until first served", 2.0, exactly(first["max"]), at_most=True))
        report.targets.append(Target(label + "the last version wins", 1, exactly(float(phase["last_version_wins"]))))
    return report


def registry_report(options: Options, log: Log) -> BenchmarkReport:
    """What a miss costs before the engine's loader has a directory: the version looked up, its files fetched. Then
    10,000 tenants end to end."""
    from pedro.registry import Registry

    size = MODEL_SIZES[(options.models or ("S",))[0]]
    count = 3 if options.quick else 20
    home = bench_folder() / "registry"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    try:
        settings = Settings.from_env({"PEDRO_HOME": str(home)})
        backbone = resolve_backbone(str(backbone_with_words(size)))
        registry = Registry.open(settings)
        log(f"registering {count} adapters of {size.name}")
        for source in adapter_directories(size, "pedro", count):
            register_version(registry, adapted(source, backbone, home), ADAPTER)
        seen: dict[str, list[float]] = {"look up": [], "fetch": [], "fetch again": []}
        for number in range(1, count + 1):
            for case, work in (
                ("look up", lambda n: registry.get(MODEL, n)),
                ("fetch", lambda n: registry.download(registry.get(MODEL, n))),
                ("fetch again", lambda n: registry.download(registry.get(MODEL, n))),
            ):
                began = time.perf_counter()
                work(number)
                seen[case].append((time.perf_counter() - began) * 1000)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    report = BenchmarkReport("registry", {"model": size.name, "adapters": count})
    for case, times in seen.items():
        report.rows.append({"case": case, "median_ms": round(median(times), 2), "longest_ms": round(max(times), 2)})
    tenants_http.add(report, options, backbone, log)
    return report


SERVER_BENCHMARKS = {
    "fairness": Benchmark(
        "a quiet tenant's first token beside the floods of another, in process and over HTTP",
        fairness_report,
        FAIRNESS_COLUMNS,
    ),
    "chat": Benchmark(
        "MT-Bench conversations and a 2 k-token prompt on SmolLM2-135M-Instruct, served, beside generate()",
        chat_server.run,
        chat_server.COLUMNS,
    ),
    "dashboard": Benchmark(
        "the dashboard's pages among 10,000 runs and 500 adapters",
        dashboard_pages.dashboard_report,
        dashboard_pages.COLUMNS,
    ),
    "control_plane": Benchmark(
        "1,000 to 100,000 names in PostgreSQL, followed by four gateways: moved aliases, idle cost, memory",
        control_plane.control_plane_report,
        control_plane.COLUMNS,
    ),
    "registry": Benchmark(
        "what a miss costs in the registry; 10,000 tenants end to end beside one",
        registry_report,
        REGISTRY_COLUMNS,
    ),
    "http": Benchmark("streaming through Ray Serve against the engine in process", http_report, http_overhead.COLUMNS),
    "dryrun": Benchmark(
        "time and memory that `pedro submit --dry-run` promises, beside what the job takes",
        dry_run.run,
        dry_run.COLUMNS,
    ),
    "scaleout": Benchmark(
        "one, two and four replicas of one thread behind the router; adapters placed by it or at random",
        scaleout.run,
        scaleout.COLUMNS,
    ),
    "queue": Benchmark(
        "five fine-tunes, what carries them killed in their middle; then --rounds (20) of two jobs and drawn kills",
        queue_kills.queue_report,
        queue_kills.COLUMNS,
    ),
    "canary": Benchmark(
        "a canary over HTTP: its share, the same version for a user, bad ones withdrawn",
        canary.canary_report,
        canary.COLUMNS,
    ),
    "batch": Benchmark(
        "a batch of 2,000 rows whose engine replica is killed: each row answered once",
        batch_kill.batch_report,
        batch_kill.COLUMNS,
    ),
    "load": Benchmark(
        "chaos: stock clients and jobs while everything around them is killed, in an order that a seed has drawn",
        chaos_run.load_report,
        chaos_run.COLUMNS,
    ),
    "outage": Benchmark(
        "the database away for a minute, under 64 streams at three gateways",
        outage.outage_report,
        outage.COLUMNS,
    ),
    "soak": Benchmark(
        "ten minutes of churn: memory, descriptors, threads, rows and files that should not grow",
        soak.soak_report,
        soak.COLUMNS,
    ),
    "swap": Benchmark(
        "an alias that moves under load: nothing fails, nothing is mixed",
        swap_report,
        ("every_s", "moves", "answers", "failed", "mixed", "stale", "first_served_s", "slowest_s", "last_version_wins"),
    ),
}
