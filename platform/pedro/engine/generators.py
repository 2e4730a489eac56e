"""Reads an adapter directory into generators that the engine can run. Knows nothing of slots, requests or pools.

PEDRO and PARA are the same thing here: a generator a layer, with a learned or a fixed activation.
Legend: D model width, R bottleneck, W all targets' widths together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file

from pedro.errors import AdapterError
from pedro.methods import PedroConfig
from pedro.methods.adapter_files import verify_adapter
from pedro.methods.architectures import Architecture
from pedro.methods.pedro.generator import GeneratorWeights
from pedro.methods.pedro.model import CHILD

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class GeneratorAdapter:
    """An adapter ready to make vectors: its generators in float32 on the engine's device, one a layer."""

    digest: str
    targets: tuple[str, ...]
    widths: tuple[list[int], ...]  # of the targets, by layer
    pool: str
    pool_source: str
    layers: tuple[GeneratorWeights, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(part.nbytes for layer in self.layers for part in layer if isinstance(part, torch.Tensor))


def load_generators(
    directory: Path, architecture: Architecture, backbone_digest: str, device: torch.device
) -> GeneratorAdapter:
    """The adapter in `directory`. Raises AdapterError if it is damaged, made for another backbone (both digests are
    named) or of a method that mixed batches do not serve."""
    manifest = verify_adapter(directory, backbone_digest)
    config = _read_config(Path(directory))
    weights = load_file(Path(directory) / WEIGHTS, device="cpu")
    activations = config.activations(len(architecture.layers))
    layers, widths = [], []
    for place, activation in zip(architecture.layers, activations, strict=True):
        missing = [target for target in config.targets if target not in place.sites]
        if missing:
            raise AdapterError(f"adapter: the backbone's blocks have no {', '.join(missing)}")
        width = [place.sites[target].width for target in config.targets]
        prefix = f"base_model.model.{place.name}.{CHILD}.pedro_"
        shapes: dict[str, tuple[int, ...]] = {
            "down": (architecture.hidden_size, config.r),
            "up": (config.r, sum(width)),
            "bias": (sum(width),),
        }
        if activation == "rational":
            shapes |= {"a": (config.orders[0] + 1,), "b": (config.orders[1],)}
        parts = {name: _take(weights, prefix + name, shape).to(device) for name, shape in shapes.items()}
        layers.append(GeneratorWeights(**parts, activation=activation))
        widths.append(width)
    if weights:
        raise AdapterError(f"adapter: its weights hold what its config does not explain: {min(weights)}")
    return GeneratorAdapter(
        digest=manifest["digest"],
        targets=tuple(config.targets),
        widths=tuple(widths),
        pool=config.pool,
        pool_source=config.pool_source,
        layers=tuple(layers),
    )


def _read_config(directory: Path) -> PedroConfig:
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, PedroConfig):
        raise AdapterError(
            f"adapter: the engine serves PEDRO and PARA adapters in mixed batches, not "
            f"{getattr(config.peft_type, 'value', config.peft_type)}; train with method.name: pedro"
        )
    return config


def _take(weights: dict[str, torch.Tensor], key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Take one tensor out of `weights`, checked, as float32."""
    if key not in weights:
        raise AdapterError(f"adapter weights: {key} is missing; save the adapter again with save_adapter")
    tensor = weights.pop(key)
    if tuple(tensor.shape) != shape:
        raise AdapterError(f"adapter weights: {key} has shape {list(tensor.shape)}, expected {list(shape)}")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"adapter weights: {key} holds numbers that are not finite; the training diverged")
    return tensor.float()
