"""Where each tensor of a backbone lies in its files, for those who read pieces of it.

So that this can be, the files must hold the model's tensors under its own names and in its shapes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pedro.adapter_directory import tensor_heads
from pedro.backbone import BUFFERS, load_config
from pedro.errors import PedroError

if TYPE_CHECKING:
    from pedro.backbone import Backbone

KINDS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredTensor(NamedTuple):
    """Where a tensor's numbers lie, and under which key."""

    file: Path
    key: str
    first_byte: int
    dtype: torch.dtype


def stored_tensors(backbone: Backbone) -> dict[str, StoredTensor]:
    """Where each parameter lies, by the model's name of it; nothing where the files hold other tensors or lack one.

    Reads heads of files alone.
    """
    from transformers import AutoModelForCausalLM

    config: Any = load_config(backbone)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(shapes)
    found: dict[str, StoredTensor] = {}
    try:
        for file in sorted(backbone.directory.glob("*.safetensors")):
            for saved, kind, shape, path, first, last in tensor_heads(file):
                names = (saved, f"{model.base_model_prefix}.{saved}")
                name = next((name for name in names if name in shapes), None)
                if name is None:
                    if saved in tied or BUFFERS.search(saved):
                        continue
                    return {}
                fits = tuple(shape) == shapes[name] and kind in KINDS
                if not fits or last - first != math.prod(shape) * KINDS[kind].itemsize:
                    return {}
                found[name] = StoredTensor(path, saved, first, KINDS[kind])
    except PedroError:  # a head that cannot be read: loading it whole says what is wrong
        return {}
    return found if found.keys() == shapes.keys() else {}
