"""A server of a few versions of one random adapter, for benchmarks of what happens to its requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks import http_overhead
from jobs.benchmarks.local_server import TENANT, LocalServer, local_server, register_version
from jobs.benchmarks.model_sizes import MODEL_SIZES, ModelSize, saved_model
from jobs.benchmarks.random_adapters import adapter_directories
from pedro.backbone import Backbone, resolve_backbone

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from pedro.registry import Registry

ADAPTER = "demo"
MODEL = f"{TENANT}.{ADAPTER}"


@dataclass(frozen=True)
class RunningServer:
    """A server that runs for a benchmark; the first of the versions of MODEL is its champion."""

    server: http_overhead.Server
    local: LocalServer
    versions: tuple[int, ...]


@contextmanager
def running_server(
    options: Options, log: Log, *, versions: int = 2, gateways: int = 1, database_url: str = ""
) -> Iterator[RunningServer]:
    """A server of so many versions of one random adapter for the time of the `with`. A `database_url` is of a server
    that has this release's schema and no rows."""
    from pedro.serving.config import ServeConfig

    size = MODEL_SIZES[(options.models or ("S",))[0]]
    backbone = resolve_backbone(str(backbone_with_words(size)))
    numbers: list[int] = []
    adapters: list[Path] = []

    def register(registry: Registry, home: Path) -> None:
        if database_url:
            registry.take_over()  # of none: a server's database is served only once that was looked for
        log(f"registering {versions} versions of {MODEL} on {size.name}")
        made = adapter_directories(size, "pedro", versions)
        adapters.extend(adapted(source, backbone, home) for source in made)
        numbers.extend(register_version(registry, adapter, ADAPTER) for adapter in adapters)
        registry.promote(MODEL, numbers[0])

    config = ServeConfig(
        backbone=str(backbone.directory), served_name=size.name, threads=options.threads, gateways=gateways
    )
    with local_server(config, register, log, database_url=database_url) as local:
        server = http_overhead.Server(
            size.name, local.url, local.key(), MODEL, str(adapters[0]), str(backbone.directory)
        )
        yield RunningServer(server, local, tuple(numbers))


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


def adapted(source: Path, backbone: Backbone, home: Path, strength: float = 1.0) -> Path:
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
            tensor += strength * torch.randn(tensor.shape, generator=noise)
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
