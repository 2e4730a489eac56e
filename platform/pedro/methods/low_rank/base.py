"""What low-rank methods share: tensors by projection, and two factors made of them.

A method gives a `LowRankConfig`: which tensors a projection has, how they start, and how they become `a` and `b`:
y ← y + (x · a) · b. `low_rank_reader` reads saved adapters for the engine by the same config, so that what is served
is what was trained.
Shapes: B rows, T tokens, R rank of a projection's change, W its output width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from pedro.adapter_kinds import Adapter, LowRank
from pedro.methods.architectures import LINEARS, Architecture, LayerSites
from pedro.methods.blocks import TunerConfig
from pedro.methods.deltas import DeltaLayer, DeltaTuner, inputs_of
from pedro.methods.options import expect_names
from pedro.methods.reader import ROOT, Reader, SavedTensors, check_targets, input_width

Tensors = Mapping[str, torch.Tensor]
Factors = tuple[torch.Tensor, torch.Tensor]  # a [in, R], b [R, W]


class Linear(NamedTuple):
    """A projection as a low-rank term sees it. `weight` makes its [W, in]; None where it is gone."""

    target: str
    layer: int
    inputs: int
    width: int
    weight: Callable[[], torch.Tensor] | None = None


@dataclass
class LowRankConfig(TunerConfig):
    """Options of a low-rank method. Tensors go by the names of `shapes`; with `shared`, all blocks have the same."""

    shared: ClassVar[bool] = False

    targets: tuple[str, ...] = field(
        default=LINEARS, metadata={"help": f"Projections that are changed, of {', '.join(LINEARS)}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets = tuple(self.targets)
        expect_names("targets", self.targets, LINEARS)

    def shapes(self, linear: Linear) -> dict[str, tuple[int, ...]]:
        """The tensors of one projection, by name. Raises ConfigError for a projection that the method cannot change."""
        raise NotImplementedError

    def start(self, name: str, tensor: torch.Tensor) -> None:
        """Fill a new tensor, which is zero, with what it starts from."""
        raise NotImplementedError

    def factors(self, tensors: Tensors, linear: Linear) -> Factors:
        """`a` and `b` of one projection, from its tensors, float32."""
        raise NotImplementedError


def names(prefix: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """`adapter_layer_names` of tensors that every target has of its own: "<prefix><part>_<target>"."""
    return tuple(f"{prefix}{part}_{target}" for target in LINEARS for part in parts)


class LowRankLayer(DeltaLayer):
    """One block's tensors by adapter. A subclass names them, those that are not trained in `frozen_names`."""

    frozen_names: ClassVar[tuple[str, ...]] = ()
    prefix: ClassVar[str]

    def __init__(self, index: int, layer_sites: LayerSites, first: DeltaLayer | None = None) -> None:
        super().__init__(index, layer_sites, first)
        self.other_param_names = (*self.other_param_names, *self.frozen_names)
        for name in self.frozen_names:
            setattr(self, name, BufferDict({}, persistent=True))

    def update_layer(self, adapter_name: str, config: LowRankConfig) -> None:
        """Add a fresh adapter."""
        holder = self.first if config.shared else self
        for target in config.targets:
            for name, shape in config.shapes(self.linear(target)).items():
                held = getattr(holder, self.prefix + name)
                if adapter_name in held and config.shared:
                    continue
                tensor = torch.zeros(shape, **self.fresh())
                config.start(name, tensor)
                held[adapter_name] = tensor if self.prefix + name in self.frozen_names else nn.Parameter(tensor)
        self.configs[adapter_name] = config

    def linear(self, target: str) -> Linear:
        """One of the block's projections."""
        width = self.layer_sites.linears[target].width
        return Linear(target, self.index, self.inputs(target), width, lambda: self.base_weight(target))

    def tensors(self, adapter_name: str, target: str) -> dict[str, torch.Tensor]:
        """An adapter's tensors of one target, by the config's names."""
        config = self.configs[adapter_name]
        holder = self.first if config.shared else self
        named = config.shapes(self.linear(target))
        return {name: getattr(holder, self.prefix + name)[adapter_name] for name in named}

    def factors(self, adapter_name: str, target: str) -> Factors:
        """An adapter's `a` and `b` of one target."""
        a_b: Factors = self.configs[adapter_name].factors(self.tensors(adapter_name, target), self.linear(target))
        return a_b

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x [B, T, in] -> [B, T, W]."""
        a, b = self.factors(name, target)
        return (x @ a) @ b

    def weight_change(self, name: str, target: str) -> torch.Tensor:
        """The change [W, in] of one target's weight."""
        a, b = self.factors(name, target)
        return (a @ b).T


class LowRankTuner(DeltaTuner):
    """Puts LowRankLayers into the blocks."""

    packs = shares_beginnings = True

    def check(self, config: LowRankConfig, architecture: Architecture) -> None:
        """Raise ConfigError for targets that the backbone lacks, or that the method cannot change."""
        super().check(config, architecture)
        for index, layer in enumerate(architecture.layers):
            for target in config.targets:
                site = layer.linears[target]
                config.shapes(Linear(target, index, inputs_of(site.module), site.width))


def low_rank_reader(config_cls: type[LowRankConfig], tuner: type[LowRankTuner]) -> Reader:
    """What reads a low-rank method's saved adapters for the engine; enough to have the method served."""
    return Reader(config_cls.kind, partial(_read, tuner))


def _read(
    tuner: type[LowRankTuner], config: LowRankConfig, tensors: SavedTensors, architecture: Architecture
) -> Adapter:
    """The factors that the config makes of its tensors, one set of them if they are shared."""
    shared: dict[str, torch.Tensor] = {}
    layers = []
    for index, block in enumerate(architecture.layers):
        check_targets(config.targets, block.linears)
        terms: dict[str, LowRank] = {}
        for target in config.targets:
            inputs = input_width(block, [target], architecture.hidden_size)
            linear = Linear(target, index, inputs, block.linears[target].width)
            owner = architecture.layers[0] if config.shared else block
            prefix = f"{ROOT}{owner.name}.{tuner.child}.{tuner.prefix}"
            shapes = config.shapes(linear)
            taken = {name: tensors.take(prefix + name, shape) for name, shape in shapes.items() if name not in shared}
            if config.shared:
                shared |= taken
                taken = {name: shared[name] for name in shapes}
            terms[target] = LowRank(*config.factors(taken, linear))
        layers.append(terms)
    return Adapter(low_rank=tuple(layers))
