"""Whether a saved adapter can be served in batches that mix adapters, and what the engine runs of it.

Servability is stated once, by `Method.readers`: an adapter is served if a method of the registry has a reader for its
`peft_type`, which implements every field that its config sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from pedro.backbone import Backbone, load_config
from pedro.errors import AdapterError
from pedro.methods.adapter_files import CONFIG, read_config, verify_adapter
from pedro.methods.architectures import Architecture, describe
from pedro.methods.reader import Reader, SavedTensors
from pedro.methods.registry import METHODS

if TYPE_CHECKING:
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
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
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
    tensors = SavedTensors(directory, device)
    adapter = reader.read(config, tensors, architecture)
    tensors.finish()
    return adapter.padded(pad_to)


def check_servable(directory: str | Path, backbone: Backbone) -> None:
    """Open a saved adapter as the engine would, over the backbone's shapes alone; no weights of it are read.

    Raises AdapterError that says why it cannot be served in mixed batches, BackboneError for an unsupported backbone.
    """
    if not (Path(directory) / CONFIG).is_file():
        raise AdapterError("adapter: a whole model is not served in mixed batches; train with method.name: pedro")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(load_config(backbone))
    read_adapter(directory, describe(skeleton), backbone.digest, torch.device("cpu"))


def _readers() -> dict[str, Reader]:
    """The readers of all methods, by `peft_type`."""
    return {reader.peft_type: reader for method in METHODS.values() for reader in method.readers}


def _served_titles() -> list[str]:
    """What the methods that have a reader are called, numbered variants left out."""
    named = [method for method in METHODS.values() if method.readers and not method.name.rpartition("-")[2].isdigit()]
    return [method.title.partition(":")[0] for method in named]
