"""End to end at ten thousand tenants: store, gateway and engine, beside the same load of one tenant.

Each tenant has an adapter of its own, and each that is asked a key. What a round asks is resident before it is timed;
the two loads take turns.
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, Log
from jobs.benchmarks.entered_adapters import ADAPTER, enter, tenant_name
from jobs.benchmarks.local_server import local_server
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS
from jobs.benchmarks.report import Target
from jobs.benchmarks.stats import paired_ratio

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.report import BenchmarkReport
    from pedro.backbone import Backbone
    from pedro.registry import Registry

TENANTS, REQUESTS, ROUNDS = 10_000, 64, 7
QUICK = (100, 8, 2)
ADAPTER_MB = 2048
LEAST = 0.9
ONE, MANY = "one tenant", "many tenants"
Caller = tuple[str, str]  # model and key


def add(report: BenchmarkReport, options: Options, backbone: Backbone, log: Log) -> None:
    """Rows and target of the throughput that `REQUESTS` of as many tenants have, over that of one tenant's."""
    from pedro.serving.config import ServeConfig

    tenants, requests, rounds = QUICK if options.quick else (TENANTS, REQUESTS, ROUNDS)
    requests, rounds = (options.batches or (requests,))[0], options.rounds or rounds
    size = (options.models or ("S",))[0]
    rng = random.Random(0)  # noqa: S311
    drawn = [rng.sample(range(1, tenants), requests) for _ in range(rounds + 1)]
    asked = sorted({0, *(number for of_round in drawn for number in of_round)})

    def register(registry: Registry, _home: Path) -> None:
        log(f"entering {tenants:,} tenants' adapters, {len(asked):,} of them with their files")
        enter(registry, MODEL_SIZES[size], backbone, tenants, asked)

    config = ServeConfig(
        backbone=str(backbone.directory), served_name=size, threads=options.threads, adapter_budget_mb=ADAPTER_MB
    )
    seen: dict[str, list[dict[str, Any]]] = {ONE: [], MANY: []}
    with local_server(config, register, log) as local, EnginePool(log) as pool:
        callers = {number: (f"{tenant_name(number)}.{ADAPTER}", local.key(tenant_name(number))) for number in asked}
        model, key = callers[0]
        pool.start("client", "http", {"size": size, "url": local.url, "key": key, "model": model})
        if pool.wait():
            for number, of_round in enumerate(drawn):
                loads = {ONE: [callers[0]] * requests, MANY: [callers[tenant] for tenant in of_round]}
                _round(pool, loads, number, seen, log)
        report.skipped |= pool.skipped
    if seen[MANY]:
        _report(report, seen, tenants, requests)


def _round(
    pool: EnginePool, loads: dict[str, list[Caller]], number: int, seen: dict[str, list[dict[str, Any]]], log: Log
) -> None:
    """One turn of each load; the first round counts for nothing."""
    for case in list(loads)[:: -1 if number % 2 else 1]:
        order = {"batch": len(loads[case]), "prompt": PROMPT_TOKENS, "seed": number, "callers": loads[case]}
        pool.run("client", {**order, "prompt": 8, "new": 2})  # from here on they are resident
        figures = pool.run("client", {**order, "new": NEW_TOKENS})
        if number:
            seen[case].append(figures)
            log(f"  round {number}, {case}: {figures['tok_s']:.0f} tok/s, first token {figures['ttft_ms']:.0f} ms")


def _report(report: BenchmarkReport, seen: dict[str, list[dict[str, Any]]], tenants: int, requests: int) -> None:
    ratio = paired_ratio(*([figures["tok_s"] for figures in seen[case]] for case in (MANY, ONE)))
    for case, rounds in seen.items():
        row: dict[str, Any] = {"case": f"end to end, {case}", "tenants": tenants, "requests": requests}
        row |= {key: round(median(figures[key] for figures in rounds), 2) for key in ("tok_s", "ttft_ms")}
        if case == MANY:
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
        report.rows.append(row)
    name = f"end to end, {requests} requests of as many of {tenants:,} tenants / of one tenant: throughput"
    report.targets.append(Target(name, LEAST, ratio))
