"""Whether a saved adapter can be served in batches that mix adapters, and what the engine runs of it.

Servability is stated once, by `Method.readers`: an adapter is served if a method of the registry has a reader for its
`peft_type`, which implements every field that its config sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from pedro.adapter_directory import CONFIG, WEIGHTS, verify_adapter
from pedro.backbone import Backbone, load_config
from pedro.errors import AdapterError
from pedro.methods.adapter_files import read_config
from pedro.methods.architectures import Architecture, describe
from pedro.methods.named_modules import check_named
from pedro.methods.options import is_count
from pedro.methods.reader import DeclaredTensors, Reader, SavedTensors
from pedro.methods.registry import METHODS

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from pedro.adapter_kinds import Adapter


def read_adapter(
    directory: str | Path, architecture: Architecture, backbone_digest: str, device: torch.device, pad_to: int = 1
) -> Adapter:
    """The adapter in `directory`, ranks rounded up to a multiple of `pad_to`.

    Raises AdapterError if it is damaged, was made for another backbone (both digests are named), or is of a method or
    has an option that mixed batches do not serve.
    """
    directory = Path(directory)
    verify_adapter(directory, backbone_digest)
    config = read_config(directory)
    tensors = SavedTensors(directory, device)
    return _read(config, tensors, architecture).padded(pad_to)


def _read(config: PeftConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    peft_type = _type_of(config)
    reader = _readers().get(peft_type)
    if reader is None:
        raise AdapterError(
            f"adapter: the engine serves {', '.join(_served_titles())} adapters in mixed batches, not {peft_type}; "
            "train with method.name: pedro"
        )
    if unsupported := reader.unsupported(config):
        raise AdapterError(
            f"adapter: {peft_type} with {', '.join(unsupported)} is not served in mixed batches; train without"
        )
    rank = getattr(config, "r", 1)
    if reader.fields is not None and (not is_count(rank) or rank < 1):  # a config of this package checks its own
        raise AdapterError(f"adapter: r: expected a whole number > 0, got {rank!r}; save the adapter again with PEFT")
    adapter = reader.read(config, tensors, architecture)
    tensors.finish()
    return adapter


def check_servable(directory: str | Path, backbone: Backbone) -> None:
    """Open a saved adapter as the engine would, over the backbone's shapes alone; no weights of it are read.

    Its tensors must be those that its config names: the engine, which trusts what was registered, does not ask.
    Raises AdapterError that says why it cannot be served in mixed batches, BackboneError for an unsupported backbone.
    """
    if not (Path(directory) / CONFIG).is_file():
        raise AdapterError("adapter: a whole model is not served in mixed batches; train with method.name: pedro")
    check_tensor_names(directory)
    read_adapter(directory, describe(_skeleton(backbone)), backbone.digest, torch.device("cpu"))


def check_declared(directory: str | Path, backbone: Backbone) -> None:
    """Refuse weights by their header: what the config does not explain, and more numbers than the backbone has, in the
    file or opened.

    For files of others, before they are copied or read. Raises AdapterError.
    """
    directory, skeleton = Path(directory), _skeleton(backbone)
    tensors = DeclaredTensors(directory)
    if not tensors.names:
        raise AdapterError(f"{WEIGHTS}: holds no tensors; fetch the adapter again")
    most = sum(parameter.numel() for parameter in skeleton.parameters())
    if tensors.numbers > most:
        raise AdapterError(
            f"adapter weights: {tensors.numbers:,} numbers are more than the {most:,} of {backbone.id}; this is no "
            "adapter of it"
        )
    check_tensor_names(directory)
    opened = _read(read_config(directory), tensors, describe(skeleton)).nbytes // torch.float32.itemsize
    if opened > most:
        raise AdapterError(
            f"adapter: opened for serving it has {opened:,} numbers, more than the {most:,} of {backbone.id}; "
            "train one with a smaller r"
        )


def check_tensor_names(directory: str | Path) -> None:
    """Raise AdapterError for a tensor of a module that the config does not name; of configs of PEFT's own alone."""
    config = read_config(directory)
    reader = _readers().get(_type_of(config))
    if reader is not None and reader.fields is not None:
        check_named(config, DeclaredTensors(Path(directory)).names)


def _skeleton(backbone: Backbone) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(backbone))
    return model


def _type_of(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _readers() -> dict[str, Reader]:
    """The readers of all methods, by `peft_type`."""
    return {reader.peft_type: reader for method in METHODS.values() for reader in method.readers}


def _served_titles() -> list[str]:
    """What the methods that have a reader are called, numbered variants left out."""
    named = [method for method in METHODS.values() if method.readers and not method.name.rpartition("-")[2].isdigit()]
    return [method.title.partition(":")[0] for method in named]
