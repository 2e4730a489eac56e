"""Reads constant vectors for the engine: those of ConstantConfig (RED, BitFit, (IA)³ with r), and PEFT's own (IA)³."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.adapter_kinds import Adapter
from pedro.errors import AdapterError
from pedro.methods.constants.config import ConstantConfig, constant_vectors
from pedro.methods.constants.model import CHILD
from pedro.methods.reader import MODULE_FIELDS, PEFT_FIELDS, ROOT, Reader, SavedTensors, rows_of, sites_by_module

if TYPE_CHECKING:
    import torch
    from peft import IA3Config

    from pedro.methods.architectures import Architecture


def read_constants(config: ConstantConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """Scales and shifts as the config says."""
    scales, shifts = [], []
    for block in architecture.layers:
        widths = {name: site.width for name, site in block.linears.items()}
        prefix = f"{ROOT}{block.name}.{CHILD}."
        taken = {name: tensors.take(prefix + name, shape) for name, shape in config.shapes(widths).items()}
        scale, shift = constant_vectors(config, widths, taken)
        scales.append({site: row.contiguous() for site, row in scale.items()})
        shifts.append({site: row.contiguous() for site, row in shift.items()})
    return Adapter(scale=tuple(scales), shift=tuple(shifts))


def read_ia3(_config: IA3Config, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """(IA)³ as PEFT saves it. Its factor on the input of `down` is one on the output of `up`, where there is a gate.

    A factor on an input (of `feedforward_modules`) has one row; on that of any other module it is not served.
    """
    scales = []
    for block in architecture.layers:
        scale: dict[str, torch.Tensor] = {}
        for path, sites in sites_by_module(block).items():
            key = f"{ROOT}{block.name}.{path}.ia3_l"
            if key not in tensors:
                continue
            if tensors.rows(key) == 1:
                if "down" not in sites:
                    raise AdapterError(
                        f"adapter: (IA)³ on the input of {path} is not served; leave it out of feedforward_modules"
                    )
                if "gate" not in block.sites:
                    raise AdapterError("adapter: (IA)³ on the MLP of a backbone without a gate is not served")
                made = {"up": tensors.take(key, (1, block.sites["up"].width))[0]}
            else:
                factor = tensors.take(key, (sum(block.linears[site].width for site in sites), 1))[:, 0]
                made = {site: rows_of(factor, block, site) for site in sites}
            scale |= {site: row * scale[site] if site in scale else row for site, row in made.items()}
        scales.append(scale)
    return Adapter(scale=tuple(scales))


CONSTANT_READER = Reader(ConstantConfig.kind, read_constants)
IA3_READER = Reader("IA3", read_ia3, PEFT_FIELDS | MODULE_FIELDS | {"feedforward_modules", "init_ia3_weights"})
