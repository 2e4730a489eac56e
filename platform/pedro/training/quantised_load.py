"""Loads a backbone with its projections in 8 or 4 bit, tensor by tensor, and counts what it then takes.

Embeddings, norms, biases and the head stay as they are. A float weight is gone before the next one is read, wherever
the files hold the model's tensors under its own names; else the backbone is loaded whole and then made smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from pedro.backbone import Backbone, check_dtype_and_device, load_model
from pedro.cpu_attention import attend_in_float32
from pedro.methods.architectures import describe
from pedro.process import release_freed_memory
from pedro.quantised_linear import held_bytes, quantised
from pedro.training.backbone_pieces import Piece, can_be_cut, fill, load_in_pieces
from pedro.training.memory import Footprint

if TYPE_CHECKING:
    from torch import nn

WEIGHT = ".weight"


def load_quantised(backbone: Backbone, dtype: str, kind: str, device: str) -> nn.Module:
    """The backbone as `load_model` makes it, but for its projections, which are held as `kind`.

    Raises BackboneError for files that cannot be read.
    """
    check_dtype_and_device(dtype, device)
    model: Any
    if can_be_cut(backbone):
        model = load_in_pieces(backbone, dtype, torch.device("cpu"), nullcontext())  # no memory behind it yet
        fill(backbone, _tensors(model, kind, device))
    else:
        model = load_model(backbone, dtype)
        for name in projections(model):
            _quantise(model, name, kind, device)
    if device == "cpu" and dtype != "float32":  # as `load_model` has it
        attend_in_float32(model)
    release_freed_memory()
    on_device: nn.Module = model.to(device)
    return on_device


def projections(model: nn.Module) -> list[str]:
    """Names of the modules that are quantised: the projections of all blocks, fused ones once."""
    chosen = {site.module for block in describe(model).layers for site in block.linears.values()}
    return [name for name, module in model.named_modules() if module in chosen]


def footprint(model: nn.Module, kind: str, size: int) -> Footprint:
    """Of a model that is not quantised yet, whose other numbers take `size` bytes. Reads shapes alone."""
    modules: list[Any] = [model.get_submodule(name) for name in projections(model)]
    weights = [module.weight for module in modules]
    widths = [getattr(module, "out_features", None) or module.nf for module in modules]
    total = sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in weights)
    held = sum(
        held_bytes((width, weight.numel() // width), kind) for width, weight in zip(widths, weights, strict=True)
    )
    return Footprint(size * total + held, size * max(weight.numel() for weight in weights))


def _tensors(model: nn.Module, kind: str, device: str) -> Iterator[Piece]:
    """Every tensor whole, for `fill`, which takes the next one when it has read this one; a projection's is then
    quantised."""
    chosen = {f"{name}{WEIGHT}" for name in projections(model)}
    for name in [name for name, _ in model.named_parameters()]:
        numbers = model.get_parameter(name).data.view(-1)
        yield Piece(name, numbers.numel(), 0, numbers)
        del numbers
        if name in chosen:
            _quantise(model, name.removesuffix(WEIGHT), kind, device)
            release_freed_memory()  # of the weights before, which the C library would keep


def _quantise(model: nn.Module, name: str, kind: str, device: str) -> None:
    module: Any = model.get_submodule(name)
    model.set_submodule(name, quantised(module.to(device), kind))
