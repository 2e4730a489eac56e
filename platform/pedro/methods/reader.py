"""How a saved adapter becomes what the engine runs: a reader for each `peft_type`, beside the method that saves it.

A reader takes an adapter's tensors one by one and makes the neutral kinds of `pedro.adapter_kinds` of them. Here is
what all readers share; which methods have one is said by their `Method.readers`, and `servable` picks it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from pedro.adapter_directory import MAX_HEADER_BYTES, WEIGHTS, tensor_heads
from pedro.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftConfig

    from pedro.adapter_kinds import Adapter
    from pedro.methods.architectures import Architecture, LayerSites

ROOT = "base_model.model."  # PEFT's prefix of every tensor
PEFT_FIELDS = frozenset({"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"})
PEFT_FIELDS |= {"revision", "inference_mode"}
MODULE_FIELDS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"})
MODULE_FIELDS |= {"fan_in_fan_out"}
LARGEST_NUMBER = 8  # bytes
LORA_FIELDS = frozenset({"r", "lora_alpha", "lora_dropout", "init_lora_weights"})


class SavedTensors:
    """An adapter's tensors, taken one by one and checked; all must be taken in the end."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._tensors = load_file(directory / WEIGHTS, device="cpu")
        self._device = device

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor as float32 on the engine's device."""
        if key not in self._tensors:
            raise AdapterError(f"adapter weights: {key} is missing; save the adapter again with save_adapter")
        tensor = self._tensors.pop(key)
        if tuple(tensor.shape) != shape:
            raise AdapterError(f"adapter weights: {key} has shape {list(tensor.shape)}, expected {list(shape)}")
        return self._numbers(key, tensor)

    def _numbers(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        if not math.isfinite(tensor.float().sum().item()):
            raise AdapterError(f"adapter weights: {key} contains numbers that are not finite; the training diverged")
        return tensor.to(self._device, torch.float32)

    def rows(self, key: str) -> int:
        """The length of a tensor's first axis."""
        return len(self._tensors[key])

    def finish(self) -> None:
        """Refuse weights that the config does not explain."""
        if self._tensors:
            raise AdapterError(f"adapter: its weights hold what its config does not explain: {min(self._tensors)}")


class DeclaredTensors(SavedTensors):
    """What the header of the weights says that they hold: tensors with shapes and without numbers.

    So a config says what there may be before anything of it is read, however large the file is.
    """

    def __init__(self, directory: Path) -> None:
        file = directory / WEIGHTS
        heads = list(tensor_heads(file))
        try:
            self._tensors = {name: torch.empty(shape, device="meta") for name, _, shape, *_ in heads}
        except (RuntimeError, TypeError, ValueError) as error:
            raise AdapterError(f"{WEIGHTS}: is damaged or not a safetensors file; fetch the adapter again") from error
        self.names = frozenset(self._tensors)
        self.numbers = sum(tensor.numel() for tensor in self._tensors.values())
        held = sum(end - begin for *_, begin, end in heads)
        most = LARGEST_NUMBER * self.numbers + MAX_HEADER_BYTES
        if held > LARGEST_NUMBER * self.numbers or file.stat().st_size > most:
            raise AdapterError(f"{WEIGHTS}: holds more than its {len(heads)} tensors take; fetch the adapter again")

    def _numbers(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@dataclass(frozen=True)
class Reader:
    """Reads the adapters of one `peft_type`: `read(config, tensors, architecture)` makes what the engine runs.

    `fields` are those of a config of PEFT's own that `read` implements: an adapter with any other away from its default
    is refused. None: all of them, as for every config of this package.
    """

    peft_type: str
    read: Callable[[Any, SavedTensors, Architecture], Adapter]
    fields: frozenset[str] | None = None

    def unsupported(self, config: PeftConfig) -> list[str]:
        """The config's fields that are not at their defaults and that `read` does not implement, as `name = value`."""
        unsupported = []
        for field in dataclasses.fields(config):
            if self.fields is None or field.name in self.fields:
                continue
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            value = getattr(config, field.name, default)
            if value != default and (value or default):  # None, false and empty are all "not asked for"
                unsupported.append(f"{field.name} = {value!r}"[:100])
        return unsupported


def check_targets(targets: Iterable[str], sites: Iterable[str]) -> None:
    """Raise AdapterError for targets that the backbone's blocks lack."""
    if missing := [target for target in targets if target not in sites]:
        raise AdapterError(f"adapter: the backbone's blocks have no {', '.join(missing)}")


def sites_by_module(block: LayerSites) -> dict[str, list[str]]:
    """The sites of each projection module, by its path inside the block; a fused module has several."""
    paths = {id(module): name for name, module in block.block.named_modules()}
    sites: dict[str, list[str]] = {}
    for name, site in block.linears.items():
        sites.setdefault(paths[id(site.module)], []).append(name)
    return sites


def rows_of(tensor: torch.Tensor, block: LayerSites, site: str) -> torch.Tensor:
    """The rows of a module's [W, …] that belong to the site."""
    rows = block.linears[site].rows
    return (tensor if rows is None else tensor[rows]).contiguous()


def input_width(block: LayerSites, sites: list[str], hidden_size: int) -> int:
    """How many inputs the module of `sites` has."""
    if "down" in sites:
        return block.linears["up"].width
    return block.linears["q"].width if "o" in sites else hidden_size
