"""ETHER and ETHER+ as PEFT tuners (Bini et al. 2024, arXiv 2405.20271): weights reflected at learned hyperplanes.

ETHER: W ← W H with H = I − 2 û ûᵀ, û = u / |u|, in n diagonal blocks, each with its own û of in/n entries.
ETHER+: W ← H̃ W H, both sides of the form I − û ûᵀ + v̂ v̂ᵀ. The distance of ETHER's H from the identity is 2 in each
block, whatever u is, so that a fresh adapter cannot be the identity; ETHER+ starts with v = −u, as the authors' code
does, and is. A projection has one u, or u and v of both sides; n does not change the count.
Shapes: B rows, T tokens, W output width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from torch.nn import functional

from pedro.methods.architectures import LINEARS, Architecture
from pedro.methods.blocks import TunerConfig
from pedro.methods.deltas import DeltaLayer, DeltaTuner, inputs_of
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect, expect_count, expect_names, targets_of
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

PREFIX = "ether_"


@dataclass
class EtherConfig(TunerConfig):
    """Options of ETHER and ETHER+. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "ETHER"

    blocks: int = field(default=1, metadata={"help": "Number n of diagonal blocks."})
    plus: bool = field(default=False, metadata={"help": "Two hyperplanes on both sides: ETHER+."})
    targets: tuple[str, ...] = field(
        default=("q", "v"), metadata={"help": f"Projections that are reflected, of {', '.join(LINEARS)}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets = tuple(self.targets)
        expect_names("targets", self.targets, LINEARS)
        expect_count("blocks", self.blocks)


class EtherLayer(DeltaLayer):
    """One block's hyperplanes: at target t, u [in], and of ETHER+ also v [in], and out_u and out_v [W]."""

    adapter_layer_names = tuple(
        f"{PREFIX}{part}_{target}" for target in LINEARS for part in ("u", "v", "out_u", "out_v")
    )

    def update_layer(self, adapter_name: str, config: EtherConfig) -> None:
        """Add a fresh adapter: random hyperplanes; of ETHER+, each with its opposite, which cancels it."""
        for target in config.targets:
            sides = {"": self.inputs(target)}
            if config.plus:
                sides["out_"] = self.layer_sites.linears[target].width
            for side, width in sides.items():
                u = torch.empty(config.blocks, width // config.blocks, **self.fresh())
                nn.init.kaiming_uniform_(u, a=5**0.5)
                self._part(f"{side}u", target)[adapter_name] = nn.Parameter(u.flatten())
                if config.plus:
                    self._part(f"{side}v", target)[adapter_name] = nn.Parameter(-u.flatten())
        self.configs[adapter_name] = config

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the reflections change: W (H x − x), and of ETHER+ what H̃ does to the sum. The bias stays as it is."""
        moved = self._moved(name, target, x, "")
        change = functional.linear(moved, self.base_weight(target))
        if not self.configs[name].plus:
            return change
        bias = self.base_bias(target)
        product = output.float() if bias is None else output.float() - bias
        return change + self._moved(name, target, product + change, "out_")

    def weight_change(self, name: str, target: str) -> torch.Tensor:
        """H̃ W H − W."""
        weight = self.base_weight(target)
        change = self._moved(name, target, weight, "")  # H is symmetric, so rows of W are reflected as inputs are
        if self.configs[name].plus:
            change = change + self._moved(name, target, (weight + change).T, "out_").T
        return change

    def _moved(self, name: str, target: str, x: torch.Tensor, side: str) -> torch.Tensor:
        """H x − x in the blocks of the last axis, for the H of one side."""
        config = self.configs[name]
        pieces = x.unflatten(-1, (config.blocks, -1))
        planes = [self._part(f"{side}u", target)[name]]
        if config.plus:
            planes.append(self._part(f"{side}v", target)[name])
        parts = [functional.normalize(plane.view(config.blocks, -1), dim=-1, eps=1e-30) for plane in planes]
        parts = [unit * (pieces * unit).sum(-1, keepdim=True) for unit in parts]
        return (parts[1] - parts[0] if config.plus else -2 * parts[0]).flatten(-2)

    def _part(self, part: str, target: str) -> nn.ParameterDict:
        held: nn.ParameterDict = getattr(self, f"{PREFIX}{part}_{target}")
        return held


class EtherModel(DeltaTuner):
    """The tuner that PEFT builds for an EtherConfig."""

    prefix = PREFIX
    tuner_layer_cls = EtherLayer
    child = "mirrors"

    def check(self, config: EtherConfig, architecture: Architecture) -> None:
        """Raise ConfigError for targets that the backbone lacks, or whose sides cannot be cut into that many blocks."""
        super().check(config, architecture)
        for target in config.targets:
            site = architecture.layers[0].linears[target]
            for width in (inputs_of(site.module), *([site.width] if config.plus else [])):
                whole = width % config.blocks == 0
                expect(whole, "blocks", f"a divisor of {width}, a side of {target}", config.blocks)


def _build(plus: bool, model_config: ModelConfig, *, blocks: int = 1, targets: Targets = ("q", "v")) -> EtherConfig:
    return EtherConfig(blocks=blocks, plus=plus, targets=targets_of(model_config, targets))


def _entry(name: str, title: str, equation: str, plus: bool) -> Method:
    return Method(
        name=name,
        title=title,
        source="Bini et al. 2024, arXiv 2405.20271",
        equation=equation,
        build=partial(_build, plus),
        mergeable=True,
        identity_at_init=plus,
        paper={"blocks": 32},
        reads_weights=True,
    )


register(EtherConfig, EtherModel, "ether or ether-plus")

ETHER = _entry("ether", "ETHER", "W ← W (I − 2 û ûᵀ)", plus=False)
ETHER_PLUS = _entry("ether-plus", "ETHER+", "W ← (I − û₁û₁ᵀ + v̂₁v̂₁ᵀ) W (I − û₂û₂ᵀ + v̂₂v̂₂ᵀ)", plus=True)
METHODS = (ETHER, ETHER_PLUS)
