"""Adapters with a visible effect on stories260K, in a real sqlite MLflow store, for tests of whole systems."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from pedro.adapter_directory import write_manifest
from pedro.backbone import Backbone, load_model, load_tokenizer, resolve_backbone
from pedro.config import Settings
from pedro.data.prompt_format import PromptFormat, format_for_shape
from pedro.methods import get_method
from pedro.methods.adapter_files import save_adapter
from pedro.registry import Registry, Version

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

OTHER_BACKBONE = "sha256:" + "0" * 64


@functools.cache
def backbone() -> Backbone:
    return resolve_backbone("stories260K")


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(backbone())


@functools.cache
def _empty_store() -> Path:
    """An MLflow store with nothing in it but its schema, which takes seconds to make: made once, copied often."""
    folder = Path(tempfile.mkdtemp(prefix="pedro-store-"))
    Registry(f"sqlite:///{folder / 'mlflow.db'}", str(folder), folder, f"sqlite:///{folder / 'pedro.db'}").connect()
    return folder / "mlflow.db"


def settings_at(home: Path) -> Settings:
    """Settings of a home whose registry exists and is empty."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty_store(), home / "mlflow.db")
    return Settings.from_env({"PEDRO_HOME": str(home)})


def tuned_model(seed: int, strength: float = 0.4) -> nn.Module:
    """stories260K with a PEDRO adapter whose weights are as far from a fresh one as a long training takes them."""
    torch.manual_seed(seed)
    tuned = get_method("pedro").apply(load_model(backbone()), {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                scale = strength if ".pedro_up" in name or ".pedro_bias" in name else 0.02
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return tuned.eval()


def make_adapter(
    directory: Path, seed: int, shape: str = "messages", *, digest: str | None = None, form: PromptFormat | None = None
) -> nn.Module:
    """Save an adapter of stories260K; gives the PEFT model that carries it, the slow reference."""
    model = tuned_model(seed)
    manifest = {
        "backbone": {
            "id": backbone().id,
            "digest": digest or backbone().digest,
            "tokenizer_digest": backbone().tokenizer_digest,
        },
        "method": {"name": "pedro", "options": {}},
        "prompt_format": (form or format_for_shape(shape, tokenizer())).to_dict(),
        "metrics": {"accuracy": 0.5},
    }
    save_adapter(model, directory, manifest)
    return model


def stub_adapter(directory: Path, mark: str, backbone_digest: str, **manifest: Any) -> Path:
    """A directory that the registry takes for an adapter, for tests that never load one; its digest is of `mark`."""
    directory.mkdir(parents=True)
    save_file({mark: torch.zeros(1)}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "PEDRO"}))
    given = {"backbone": {"id": "b", "digest": backbone_digest}, "method": {"name": "pedro"}}
    write_manifest(directory, {**given, **manifest})
    return directory


def register(registry: Registry, directory: Path, name: str, *, promote: bool = True) -> Version:
    """Register a directory as the next version of `tenant.adapter`, champion unless told otherwise."""
    tenant, _, adapter = name.partition(".")
    run = registry.start_run(experiment=tenant, name="test", params={}, tags={})
    version = registry.register(run, directory, tenant, adapter)
    registry.finish_run(run)
    return registry.promote(name, version.version) if promote else version
