"""The benchmarks that need the platform around the engine: HTTP, hot swap under load, the registry's part of a miss.

Knows the platform from outside: a home of its own, two registered versions of one adapter, keys, a local Ray head.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from jobs.benchmarks import (
    chat_server,
    control_plane,
    dashboard_pages,
    dry_run,
    fairness,
    fairness_http,
    http_overhead,
    tenants_http,
)
from jobs.benchmarks.command_line import Benchmark, Options
from jobs.benchmarks.engine_benchmarks import FAIRNESS_COLUMNS
from jobs.benchmarks.local_server import TENANT, local_server, register_version
from jobs.benchmarks.model_sizes import MODEL_SIZES, PROMPT_TOKENS, ModelSize, bench_folder, prompts, saved_model
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.backbone import Backbone, resolve_backbone
from pedro.config import Settings

if TYPE_CHECKING:
    from jobs.benchmarks.engine_process import Log
    from pedro.registry import Registry

ADAPTER = "demo"
REGISTRY_COLUMNS = (
    *("case", "median_ms", "longest_ms", "tenants", "requests", "tok_s", "ttft_ms", "ratio", "ratio_interval"),
)


@dataclass(frozen=True)
class RunningServer:
    """A server that runs for a benchmark, and an operator's key for it."""

    server: http_overhead.Server
    admin_key: str
    other_key: str  # of another tenant
    versions: tuple[int, ...]


def http_report(options: Options, log: Log) -> BenchmarkReport:
    """The cost of gateway and Serve."""
    with running_server(options, log) as running:
        return http_overhead.run(options, running.server, log)


def fairness_report(options: Options, log: Log) -> BenchmarkReport:
    """Floods beside a quiet tenant: on the engine in process, then through the server."""
    report = fairness.run(options, log)
    with running_server(options, log) as running:
        fairness_http.add(report, options, running.server, running.other_key, log)
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
            running.admin_key,
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
            register_version(registry, _adapted(source, backbone, home), ADAPTER)
        seen: dict[str, list[float]] = {"look up": [], "fetch": [], "fetch again": []}
        for number in range(1, count + 1):
            for case, work in (
                ("look up", lambda n: registry.get(f"{TENANT}.{ADAPTER}", n)),
                ("fetch", lambda n: registry.download(registry.get(f"{TENANT}.{ADAPTER}", n))),
                ("fetch again", lambda n: registry.download(registry.get(f"{TENANT}.{ADAPTER}", n))),
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
    "swap": Benchmark(
        "an alias that moves under load: nothing fails, nothing is mixed",
        swap_report,
        ("every_s", "moves", "answers", "failed", "mixed", "stale", "first_served_s", "slowest_s", "last_version_wins"),
    ),
}


@contextmanager
def running_server(options: Options, log: Log) -> Iterator[RunningServer]:
    """A server of two versions of one random adapter for the time of the `with`."""
    from pedro.serving.config import ServeConfig

    size = MODEL_SIZES[(options.models or ("S",))[0]]
    backbone = resolve_backbone(str(backbone_with_words(size)))
    model = f"{TENANT}.{ADAPTER}"
    versions: list[int] = []
    adapters: list[Path] = []

    def register(registry: Registry, home: Path) -> None:
        log(f"registering two versions of {model} on {size.name}")
        adapters.extend(_adapted(source, backbone, home) for source in adapter_directories(size, "pedro", 2))
        versions.extend(register_version(registry, adapter, ADAPTER) for adapter in adapters)
        registry.promote(model, versions[0])

    config = ServeConfig(backbone=str(backbone.directory), served_name=size.name, threads=options.threads)
    with local_server(config, register, log) as local:
        server = http_overhead.Server(
            size.name, local.url, local.key(), model, str(adapters[0]), str(backbone.directory)
        )
        yield RunningServer(server, local.key("operator", "admin"), local.key("other"), tuple(versions))


def backbone_with_words(size: ModelSize) -> Path:
    """The saved model with a tokenizer whose every token is one word, so that counting words counts tokens."""
    directory = saved_model(size)
    if not (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, size.vocab))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",  # noqa: S106
            bos_token="<s>",  # noqa: S106
            eos_token="</s>",  # noqa: S106
        ).save_pretrained(directory)
    return directory


def _adapted(source: Path, backbone: Backbone, home: Path) -> Path:
    """A random adapter that belongs to the served backbone, so strong that versions answer differently."""
    import torch
    from safetensors.torch import load_file, save_file

    from pedro.adapter_directory import WEIGHTS, write_manifest
    from pedro.data.prompt_format import FORMATS

    target = home / "made" / source.name
    shutil.copytree(source, target)
    weights = load_file(target / WEIGHTS)
    noise = torch.Generator().manual_seed(int(source.name) + 1)
    for name, tensor in weights.items():
        if name.endswith("pedro_bias"):
            tensor += torch.randn(tensor.shape, generator=noise)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((target / "pedro_adapter.json").read_text())
    manifest["backbone"] = {
        "id": backbone.id,
        "digest": backbone.digest,
        "tokenizer_digest": backbone.tokenizer_digest,
    }
    manifest |= {"prompt_format": FORMATS["raw"].to_dict(), "metrics": {}}
    write_manifest(target, manifest)
    return target
