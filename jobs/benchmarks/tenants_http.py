"""End to end at ten thousand tenants: store, gateway and engine, beside the same load of one tenant.

Each tenant has an adapter of its own, and each that is asked a key. What a round asks is resident before it is timed;
the two loads take turns.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, Log
from jobs.benchmarks.local_server import local_server
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import Target
from jobs.benchmarks.stats import paired_ratio
from pedro.registry import Version, utc
from pedro.store import Inherited

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
        made = zip(asked, adapter_directories(MODEL_SIZES[size], "pedro", len(asked)), strict=True)
        versions = {number: _cached(registry, source, backbone, number) for number, source in made}
        rest = (number for number in range(tenants) if number not in versions)
        versions |= {number: _version(backbone, number, f"sha256:{number}", "") for number in rest}
        registry.store.take_over(Inherited(one.name, 0.0, {"champion": 1}, (one,)) for one in versions.values())

    config = ServeConfig(
        backbone=str(backbone.directory), served_name=size, threads=options.threads, adapter_budget_mb=ADAPTER_MB
    )
    seen: dict[str, list[dict[str, Any]]] = {ONE: [], MANY: []}
    with local_server(config, register, log) as local, EnginePool(log) as pool:
        callers = {number: (f"{_tenant(number)}.own", local.key(_tenant(number))) for number in asked}
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


def _tenant(number: int) -> str:
    return f"tenant{number:05}"


def _version(backbone: Backbone, number: int, digest: str, manifest_digest: str) -> Version:
    return Version(
        _tenant(number),
        "own",
        1,
        digest,
        backbone.id,
        backbone.digest,
        "pedro",
        1,
        {},
        {},
        "",
        f"made{number}",
        utc(0),
        manifest_digest=manifest_digest,
    )


def _cached(registry: Registry, source: Path, backbone: Backbone, number: int) -> Version:
    """A tenant's adapter where this host keeps the copies that it fetched of the registry's."""
    from pedro.adapter_directory import MANIFEST, manifest_digest, read_manifest, write_manifest
    from pedro.data.prompt_format import FORMATS

    digest = str(json.loads((source / MANIFEST).read_text())["digest"])
    target = registry.cached(digest, f"made{number}")
    shutil.copytree(source, target)
    manifest = json.loads((target / MANIFEST).read_text())
    manifest["backbone"] = {
        "id": backbone.id,
        "digest": backbone.digest,
        "tokenizer_digest": backbone.tokenizer_digest,
    }
    write_manifest(target, manifest | {"prompt_format": FORMATS["raw"].to_dict(), "metrics": {}})
    written = read_manifest(target)
    return _version(backbone, number, str(written["digest"]), manifest_digest(written))
