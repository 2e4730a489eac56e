"""Reads an adapter directory into an `Adapter`. Knows nothing of slots, requests or pools.

One reader for each PEFT type that mixed batches serve. A fused projection's tensors are cut into its sites.
Legend: D model width, R bottleneck or rank, W output width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pedro.backbone import Backbone, load_config
from pedro.engine.adapter import Adapter, Generator, LowRank
from pedro.errors import AdapterError
from pedro.methods.adapter_files import CONFIG, read_config, verify_adapter
from pedro.methods.architectures import Architecture, LayerSites, describe
from pedro.methods.config_check import not_served
from pedro.methods.constants import constant_vectors
from pedro.methods.constants.model import CHILD as CONSTANT_CHILD
from pedro.methods.deltas import DeltaTuner
from pedro.methods.low_rank.base import Linear
from pedro.methods.low_rank.lora_dash import LoraDashModel
from pedro.methods.low_rank.lorta import LortaModel
from pedro.methods.low_rank.melora import MeloraModel
from pedro.methods.pedro.generator import GeneratorWeights
from pedro.methods.pedro.model import CHILD as PEDRO_CHILD
from pedro.methods.sparse_search import CHILD as SEARCH_CHILD
from pedro.methods.sparse_search import PREFIX as SEARCH_PREFIX

WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."


class _Tensors:
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
        if not torch.isfinite(tensor.float().sum()):
            raise AdapterError(f"adapter weights: {key} holds numbers that are not finite; the training diverged")
        return tensor.to(self._device, torch.float32)

    def rows(self, key: str) -> int:
        """The length of a tensor's first axis."""
        return len(self._tensors[key])

    def finish(self) -> None:
        """Refuse weights that the config does not explain."""
        if self._tensors:
            raise AdapterError(f"adapter: its weights hold what its config does not explain: {min(self._tensors)}")


def load_adapter(
    directory: Path, architecture: Architecture, backbone_digest: str, device: torch.device, strip: int = 1
) -> Adapter:
    """The adapter in `directory`; ranks are rounded up to whole `strip`s. Raises AdapterError if it is damaged, made
    for another backbone (both digests are named) or of a method that mixed batches do not serve."""
    directory = Path(directory)
    digest = verify_adapter(directory, backbone_digest)["digest"]
    config = read_config(directory)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in _READERS:
        raise AdapterError(
            f"adapter: the engine serves {', '.join(NAMES)} adapters in mixed batches, not {kind}; "
            "train with method.name: pedro"
        )
    if extra := not_served(config):
        raise AdapterError(f"adapter: {kind} with {', '.join(extra)} is not served in mixed batches; train without")
    tensors = _Tensors(directory, device)
    parts = _READERS[kind](config, tensors, architecture, strip)
    tensors.finish()
    return Adapter(digest=digest, **parts)


def check_servable(directory: str | Path, backbone: Backbone) -> None:
    """Open a saved adapter as the engine would, over the backbone's shapes alone; no weights of it are read.

    Raises AdapterError that says why it cannot be served in mixed batches, BackboneError for an unsupported backbone.
    """
    if not (Path(directory) / CONFIG).is_file():
        raise AdapterError("adapter: a whole model is not served in mixed batches; train with method.name: pedro")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(load_config(backbone))
    load_adapter(Path(directory), describe(skeleton), backbone.digest, torch.device("cpu"))


def _read_generator(config: Any, tensors: _Tensors, architecture: Architecture, _strip: int) -> dict[str, Any]:
    """PEDRO and PARA: a generator a layer, with a learned or a fixed activation; an entry of a group once a channel."""
    layers, widths = [], []
    by_layer = config.by_layer(len(architecture.layers))
    for place, (activation, r, orders) in zip(architecture.layers, by_layer, strict=True):
        missing = [target for target in config.targets if target not in place.sites]
        if missing:
            raise AdapterError(f"adapter: the backbone's blocks have no {', '.join(missing)}")
        width = [place.sites[target].width for target in config.targets]
        entries = sum(config.entries(width))
        shapes: dict[str, tuple[int, ...]] = {
            "down": (architecture.hidden_size, r),
            "up": (r, entries),
            "bias": (entries,),
        }
        if activation == "rational":
            shapes |= {"a": (orders[0] + 1,), "b": (orders[1],)}
        prefix = f"{ROOT}{place.name}.{PEDRO_CHILD}.pedro_"
        parts = {name: tensors.take(prefix + name, shape) for name, shape in shapes.items()}
        if config.group_size != 1:
            parts |= {name: parts[name].repeat_interleave(config.group_size, dim=-1) for name in ("up", "bias")}
        layers.append(GeneratorWeights(**parts, activation=activation))
        widths.append(width)
    made = Generator(
        tuple(config.targets), tuple(widths), config.pool, config.pool_source, tuple(layers), config.window
    )
    return {"generator": made}


def _read_constants(config: Any, tensors: _Tensors, architecture: Architecture, _strip: int) -> dict[str, Any]:
    """RED, BitFit and (IA)³ with a projection."""
    scales, shifts = [], []
    for place in architecture.layers:
        widths = {site: found.width for site, found in place.linears.items()}
        prefix = f"{ROOT}{place.name}.{CONSTANT_CHILD}."
        taken = {name: tensors.take(prefix + name, shape) for name, shape in config.shapes(widths).items()}
        scale, shift = constant_vectors(config, widths, taken)
        scales.append({site: row.contiguous() for site, row in scale.items()})
        shifts.append({site: row.contiguous() for site, row in shift.items()})
    return {"scale": tuple(scales), "shift": tuple(shifts)}


def _read_ia3(_config: Any, tensors: _Tensors, architecture: Architecture, _strip: int) -> dict[str, Any]:
    """(IA)³ as PEFT saves it. Its factor on the input of `down` is one on the output of `up`, where there is a gate."""
    scales = []
    for place in architecture.layers:
        scale: dict[str, torch.Tensor] = {}
        for path, sites in _modules(place).items():
            key = f"{ROOT}{place.name}.{path}.ia3_l"
            if key not in tensors:
                continue
            if "down" in sites:
                if "gate" not in place.sites:
                    raise AdapterError("adapter: (IA)³ on the MLP of a backbone without a gate is not served")
                scale["up"] = tensors.take(key, (1, place.sites["up"].width))[0]
                continue
            factor = tensors.take(key, (sum(place.linears[site].width for site in sites), 1))[:, 0]
            scale |= {site: _cut(factor, place, site) for site in sites}
        scales.append(scale)
    return {"scale": tuple(scales)}


def _read_lora(config: Any, tensors: _Tensors, architecture: Architecture, strip: int) -> dict[str, Any]:
    """LoRA as PEFT saves it, alpha over the rank folded into the second factor."""
    rank = config.r
    scaling = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
    layers = []
    for place in architecture.layers:
        terms: dict[str, LowRank] = {}
        for path, sites in _modules(place).items():
            prefix = f"{ROOT}{place.name}.{path}.lora_"
            if f"{prefix}A.weight" not in tensors:
                continue
            inputs = _inputs(place, sites, architecture.hidden_size)
            down = tensors.take(f"{prefix}A.weight", (rank, inputs)).T
            outputs = sum(place.linears[site].width for site in sites)
            up = tensors.take(f"{prefix}B.weight", (outputs, rank)) * scaling
            terms |= {site: _padded(down, _cut(up, place, site).T, strip) for site in sites}
        layers.append(terms)
    return {"low_rank": tuple(layers)}


def _read_adalora(config: Any, tensors: _Tensors, architecture: Architecture, strip: int) -> dict[str, Any]:
    """AdaLoRA as PEFT saves it: each module has the ranks that were kept, and singular values between its factors."""
    scaling = config.lora_alpha / (config.init_r + 1e-5)  # PEFT keeps to the first rank after pruning
    layers = []
    for place in architecture.layers:
        terms: dict[str, LowRank] = {}
        for path, sites in _modules(place).items():
            prefix = f"{ROOT}{place.name}.{path}.lora_"
            if f"{prefix}A" not in tensors:
                continue
            rank, inputs = tensors.rows(f"{prefix}A"), _inputs(place, sites, architecture.hidden_size)
            outputs = sum(place.linears[site].width for site in sites)
            down = tensors.take(f"{prefix}A", (rank, inputs)) * tensors.take(f"{prefix}E", (rank, 1))
            up = tensors.take(f"{prefix}B", (outputs, rank)) * scaling
            if rank:
                terms |= {site: _padded(down.T, _cut(up, place, site).T, strip) for site in sites}
        layers.append(terms)
    return {"low_rank": tuple(layers)}


def _read_sparse_search(config: Any, tensors: _Tensors, architecture: Architecture, strip: int) -> dict[str, Any]:
    """The LoRA modules and shifts that a structure search kept."""
    if config.kept is None:
        raise AdapterError("adapter: its structure search has not ended; train it to the end")
    low_rank, shifts = [], []
    for index, place in enumerate(architecture.layers):
        terms: dict[str, LowRank] = {}
        shift: dict[str, torch.Tensor] = {}
        prefix = f"{ROOT}{place.name}.{SEARCH_CHILD}.{SEARCH_PREFIX}"
        for target in (target for target in config.targets if target in place.linears):
            inputs, width = _inputs(place, [target], architecture.hidden_size), place.linears[target].width
            if f"{index}.lora.{target}" in config.kept:
                down = tensors.take(f"{prefix}a_{target}", (config.r, inputs)).T
                up = tensors.take(f"{prefix}b_{target}", (width, config.r)).T * (config.alpha / config.r)
                terms[target] = _padded(down, up, strip)
            if f"{index}.shift.{target}" in config.kept:
                shift[target] = tensors.take(f"{prefix}shift_{target}", (width,))
        low_rank.append(terms)
        shifts.append(shift)
    return {"low_rank": tuple(low_rank), "shift": tuple(shifts)}


def _read_low_rank(
    tuner: type[DeltaTuner], config: Any, tensors: _Tensors, architecture: Architecture, strip: int
) -> dict[str, Any]:
    """MELoRA, LoRA-Dash, LoRTA: the factors that their config makes of their tensors, one set of them if shared."""
    shared: dict[str, torch.Tensor] = {}
    layers = []
    for index, place in enumerate(architecture.layers):
        if missing := [target for target in config.targets if target not in place.linears]:
            raise AdapterError(f"adapter: the backbone's blocks have no {', '.join(missing)}")
        terms: dict[str, LowRank] = {}
        for target in config.targets:
            inputs = _inputs(place, [target], architecture.hidden_size)
            linear = Linear(target, index, inputs, place.linears[target].width)
            prefix = (
                f"{ROOT}{architecture.layers[0].name if config.shared else place.name}.{tuner.child}.{tuner.prefix}"
            )
            shapes = config.shapes(linear)
            taken = {name: tensors.take(prefix + name, shape) for name, shape in shapes.items() if name not in shared}
            if config.shared:
                shared |= taken
                taken = {name: shared[name] for name in shapes}
            down, up = config.factors(taken, linear)
            terms[target] = _padded(down, up, strip)
        layers.append(terms)
    return {"low_rank": tuple(layers)}


def _padded(down: torch.Tensor, up: torch.Tensor, strip: int) -> LowRank:
    """down [in, R] and up [R, W] with R and W rounded up to whole strips."""
    rank = (0, -len(up) % strip)
    up = torch.nn.functional.pad(up, (0, -up.shape[1] % strip, *rank))
    return LowRank(torch.nn.functional.pad(down, rank).contiguous(), up.contiguous())


def _modules(place: LayerSites) -> dict[str, list[str]]:
    """The sites of each projection module, by its path inside the block."""
    paths = {id(module): name for name, module in place.block.named_modules()}
    found: dict[str, list[str]] = {}
    for site, where in place.linears.items():
        found.setdefault(paths[id(where.module)], []).append(site)
    return found


def _cut(tensor: torch.Tensor, place: LayerSites, site: str) -> torch.Tensor:
    """The rows of a module's [W, …] that belong to the site."""
    rows = place.linears[site].rows
    return (tensor if rows is None else tensor[rows]).contiguous()


def _inputs(place: LayerSites, sites: list[str], hidden_size: int) -> int:
    """How many inputs the module of `sites` has."""
    if "down" in sites:
        return place.linears["up"].width
    return place.linears["q"].width if "o" in sites else hidden_size


_READERS: dict[str, Callable[[Any, _Tensors, Architecture, int], dict[str, Any]]] = {
    "PEDRO": _read_generator,
    "CONSTANT": _read_constants,
    "IA3": _read_ia3,
    "LORA": _read_lora,
    "ADALORA": _read_adalora,
    "SPARSE_SEARCH": _read_sparse_search,
    "MELORA": partial(_read_low_rank, MeloraModel),
    "LORA_DASH": partial(_read_low_rank, LoraDashModel),
    "LORTA": partial(_read_low_rank, LortaModel),
}
NAMES = ("PEDRO", "PARA", "(IA)³", "RED", "BitFit", "LoRA", "AdaLoRA", "SSP", "MELoRA", "LoRA-Dash", "LoRTA")
