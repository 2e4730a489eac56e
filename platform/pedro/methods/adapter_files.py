"""Writes an adapter's directory, whole or not at all, and reads its PEFT config. Asks no registry.

What needs neither torch nor PEFT, its manifest and its checks, is in `pedro/adapter_directory.py`.
"""

from __future__ import annotations

import json
import shutil
import uuid
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from pedro.adapter_directory import CONFIG, write_manifest
from pedro.errors import AdapterError, PedroError, UnavailableError
from pedro.methods.config_check import changed_backbone, unknown_keys, wrong_invocation

if TYPE_CHECKING:
    from torch import nn

PACKAGES = ("pedro-platform", "torch", "transformers", "peft", "safetensors")


def save_adapter(model: nn.Module, directory: str | Path, manifest: dict[str, Any]) -> str:
    """Write `model`'s adapter named "default" (or the whole model, if it carries none) and return its digest.

    `manifest` gives what only the caller knows (backbone, method, data, metrics...); created, versions,
    trainable_parameters and what `write_manifest` adds are filled in. The directory appears complete, by a rename, or
    not at all.
    Raises AdapterError if it exists with something in it, UnavailableError if it cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AdapterError(f"directory: {directory} exists already; give a new one", param="directory")
    making = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        making.mkdir(parents=True)
        _save_weights(model, making)
        digest = write_manifest(making, {**_known(model), **manifest})
        making.replace(directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnavailableError(
            f"directory: {directory} could not be written ({reason}); nothing is left of it, free some space and retry",
            param="directory",
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return digest


def read_config(directory: str | Path) -> PeftConfig:
    """The PEFT config of an adapter directory.

    Raises AdapterError if it is missing, PEFT does not take it, or it asks for what nothing here would heed: a key
    that PEFT's class does not know, a start from other weights than the backbone's.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise AdapterError(
            f"{CONFIG}: not found in {directory}, so this is not a PEFT adapter; fetch the adapter again"
        )
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(directory))
        unknown = unknown_keys(config, json.loads((directory / CONFIG).read_text(encoding="utf-8")))
    except PedroError:
        raise
    except Exception as error:  # PEFT raises whatever it meets first
        raise AdapterError(
            f"{CONFIG}: cannot be read ({type(error).__name__}: {error}); fetch the adapter again"
        ) from error
    if unknown:
        raise AdapterError(
            f"{CONFIG}: {unknown[0]}: PEFT {version('peft')} has no such field of {type(config).__name__}, so it "
            "would be ignored; train without it"
        )
    if changed := changed_backbone(config) or wrong_invocation(config):
        raise AdapterError(f"{CONFIG}: {changed}")
    return config


def _save_weights(model: nn.Module, directory: Path) -> None:
    if isinstance(model, PeftModel):
        model.save_pretrained(
            str(directory), safe_serialization=True, selected_adapters=["default"], save_embedding_layers=False
        )
    else:
        assert isinstance(model, PreTrainedModel), f"cannot save a {type(model).__name__}"
        model.save_pretrained(str(directory))


def _known(model: nn.Module) -> dict[str, Any]:
    """What a manifest tells of any model."""
    from pedro.methods.registry import count_parameters

    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "trainable_parameters": count_parameters(model)["trainable"],
    }


@cache
def _version(package: str) -> str | None:
    # kept, since each look parses all that a package says of itself
    try:
        return version(package)
    except PackageNotFoundError:
        return None
