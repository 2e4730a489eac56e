"""MoDE as a PEFT tuner (Ning et al. 2024, arXiv 2408.01505): a mixture of dyadic experts.

y ← y + Σ_j (x a_j) Σ_i R_jⁱ(x) b_jⁱ, R_j(x) = softmax(x W_j): all experts share the r down-projections a_j, and each
rank j has m up-projections b_jⁱ and a router of its own, so that every token mixes rank-one experts rank by rank. With
m = 1 it is LoRA. r (in + m W) parameters and r m in for the routers.
Shapes: B rows, T tokens, W output width of a projection, r rank, m experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pedro.methods.architectures import LINEARS
from pedro.methods.blocks import TunerConfig
from pedro.methods.deltas import DeltaLayer, DeltaTuner
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect_count, expect_names, targets_of
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

PREFIX = "mode_"


@dataclass
class ModeConfig(TunerConfig):
    """Options of MoDE. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "MODE"

    r: int = field(default=4, metadata={"help": "Rank: number of shared down-projections."})
    experts: int = field(default=4, metadata={"help": "Number m of rank-one experts for each of them."})
    targets: tuple[str, ...] = field(
        default=LINEARS, metadata={"help": f"Projections with experts, of {', '.join(LINEARS)}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets = tuple(self.targets)
        expect_names("targets", self.targets, LINEARS)
        expect_count("r", self.r)
        expect_count("experts", self.experts)


class ModeLayer(DeltaLayer):
    """One block's experts: at target t, "down" [r, in], "up" [r, m, W] and "router" [r, m, in]."""

    adapter_layer_names = tuple(f"{PREFIX}{part}_{target}" for target in LINEARS for part in ("down", "up", "router"))

    def update_layer(self, adapter_name: str, config: ModeConfig) -> None:
        """Add a fresh adapter, which changes nothing: up = 0. Random routers tell the experts apart."""
        fresh, r, m = self.fresh(), config.r, config.experts
        for target in config.targets:
            inputs, width = self.inputs(target), self.layer_sites.linears[target].width
            down = nn.init.kaiming_uniform_(torch.empty(r, inputs, **fresh), a=5**0.5)
            router = nn.init.kaiming_uniform_(torch.empty(r * m, inputs, **fresh), a=5**0.5).view(r, m, inputs)
            self._part("down", target)[adapter_name] = nn.Parameter(down)
            self._part("up", target)[adapter_name] = nn.Parameter(torch.zeros(r, m, width, **fresh))
            self._part("router", target)[adapter_name] = nn.Parameter(router)
        self.configs[adapter_name] = config

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x [B, T, in] -> [B, T, W]."""
        down, up, router = (self._part(part, target)[name] for part in ("down", "up", "router"))
        shares = torch.einsum("...i,rmi->...rm", x, router).softmax(dim=-1)
        narrow = x @ down.T  # [B, T, r]
        return torch.einsum("...rm,rmw->...w", shares * narrow[..., None], up)

    def _part(self, part: str, target: str) -> nn.ParameterDict:
        held: nn.ParameterDict = getattr(self, f"{PREFIX}{part}_{target}")
        return held


class ModeModel(DeltaTuner):
    """The tuner that PEFT builds for a ModeConfig."""

    prefix = PREFIX
    tuner_layer_cls = ModeLayer
    child = "experts"
    no_merge = "MoDE mixes its experts anew for every token, so no weight can hold them"


def _build(model_config: ModelConfig, *, r: int = 4, experts: int = 4, targets: Targets = None) -> ModeConfig:
    return ModeConfig(r=r, experts=experts, targets=targets_of(model_config, targets))


register(ModeConfig, ModeModel, "mode")

METHOD = Method(
    name="mode",
    title="MoDE",
    source="Ning et al. 2024, arXiv 2408.01505",
    equation="y ← y + Σⱼ (x aⱼ) Σᵢ softmax(x Wⱼ)ᵢ bⱼⁱ",
    build=_build,
    mergeable=False,
    identity_at_init=True,
)
