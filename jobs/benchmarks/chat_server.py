"""The benchmark `chat` on a server of its own: a kept backbone, and eight random PEDRO adapters of it.

MT-Bench's questions lie under PEDRO_TASK_DATA (`pedro tasks mt_bench` says in what form).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks.local_server import TENANT, local_server, register_version
from jobs.benchmarks.model_sizes import bench_folder
from pedro.backbone import Backbone, load_config, load_model, load_tokenizer, quiet, resolve_backbone
from pedro.errors import ConfigError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from jobs.benchmarks.report import BenchmarkReport
    from pedro.model_protocols import Tokenizer
    from pedro.registry import Registry

BACKBONE = "smollm2-135m"
COLUMNS = (
    *("texts", "engine", "adapters", "batch", "prompt_tokens", "answer_tokens", "tok_s", "ratio", "ratio_interval"),
    *("ttft_ms", "ttft_ratio", "ttft_ratio_interval", "tpot_ms", "equal"),
)


def run(options: Options, log: Log) -> BenchmarkReport:
    """The whole benchmark, in about half an hour on two cores. Raises PedroError without data or backbone."""
    from jobs.benchmarks.bench_engine import use_threads
    from jobs.benchmarks.chat import QUICK, ChatComparison, Sizes
    from jobs.benchmarks.chat_contenders import Generate, Server
    from pedro.engine.native_model import unfit
    from pedro.serving.config import ServeConfig

    data = os.environ.get("PEDRO_TASK_DATA")
    if not data:
        raise ConfigError("PEDRO_TASK_DATA: not set; give the directory that holds mt_bench/", param="data")
    names = options.backbones or (BACKBONE,)
    if len(names) > 1:
        raise ConfigError(f"backbones: chat takes one, got {', '.join(names)}", param="backbones")
    backbone = resolve_backbone(names[0])
    sizes = QUICK if options.quick else Sizes()
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds, batches=options.batches or sizes.batches)
    use_threads(options.threads)
    quiet()
    tokenizer = load_tokenizer(backbone)
    generate = Generate(load_model(backbone), tokenizer)
    adapters = [f"chat-{number}" for number in range(max(sizes.batches))]

    def register(registry: Registry, _home: Path) -> None:
        for number, directory in enumerate(make_adapters(backbone, tokenizer, len(adapters))):
            version = register_version(registry, directory, adapters[number])
            registry.promote(f"{TENANT}.{adapters[number]}", version)

    config = ServeConfig(
        backbone=str(backbone.directory),
        served_name=names[0],
        threads=options.threads,
        max_batch=max(sizes.batches),
        max_length=sizes.length,
    )
    with local_server(config, register, log) as local:
        key = local.key()
        servers = {
            "none": Server(local.url, key, [names[0]]),
            "pedro": Server(local.url, key, [f"{TENANT}.{adapter}" for adapter in adapters]),
        }
        report = ChatComparison(generate, servers, sizes, log).run(Path(data))
    report.facts["kernel"] = unfit(load_config(backbone)) or "native"
    shown = {"backbone": backbone.id, "digest": backbone.digest, "threads": options.threads, "dtype": "float32"}
    report.settings = {**shown, **report.settings}
    return report


def make_adapters(backbone: Backbone, tokenizer: Tokenizer, count: int) -> list[Path]:
    """Random adapters of the backbone, none like another, that chat as the backbone does."""
    import torch
    from transformers import AutoModelForCausalLM

    from jobs.benchmarks.random_adapters import make_adapter
    from pedro.data.prompt_format import format_for_shape

    folder = bench_folder() / "chat"
    shutil.rmtree(folder, ignore_errors=True)
    digests = {"id": backbone.id, "digest": backbone.digest, "tokenizer_digest": backbone.tokenizer_digest}
    form = format_for_shape("messages", tokenizer).to_dict()
    directories = [folder / f"{number:05}" for number in range(count)]
    for number, directory in enumerate(directories):
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(load_config(backbone), dtype=torch.float32)
        make_adapter(bare, "pedro", directory, {"backbone": digests, "prompt_format": form, "metrics": {}}, number)
    return directories
