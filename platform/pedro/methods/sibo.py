"""LoRA-SIBO as a PEFT tuner (Wen et al. 2024, arXiv 2402.11896): LoRA on an input mixed with the first one.

Against over-smoothing in deep models, each LoRA reads (1 − λ) h + λ h₀ in place of h: h₀ is the token's representation
before the first block. The frozen projection reads h as ever, and nothing more is trained than LoRA's A and B. As h₀ is
as wide as the model, only projections that read the hidden state can be changed; as it is no linear map of their own
input, no weight can hold the change, and the engine's low-rank terms cannot either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from pedro.methods.architectures import TARGETS, LayerSites, projection_paths
from pedro.methods.blocks import TunerConfig
from pedro.methods.deltas import DeltaLayer, DeltaTuner
from pedro.methods.method import Method
from pedro.methods.options import expect_count, expect_names, expect_share, names_in
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

PREFIX = "sibo_"


@dataclass
class SiboConfig(TunerConfig):
    """Options of LoRA-SIBO. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "SIBO"

    r: int = field(default=8, metadata={"help": "LoRA's rank."})
    alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})
    residual: float = field(default=0.2, metadata={"help": "Share λ of the first representation in LoRA's input."})
    targets: tuple[str, ...] = field(
        default=TARGETS, metadata={"help": f"Projections with a LoRA, of {', '.join(TARGETS)}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets = tuple(self.targets)
        expect_names("targets", self.targets, TARGETS)
        expect_count("r", self.r)
        expect_count("alpha", self.alpha)
        expect_share("residual", self.residual)


class SiboLayer(DeltaLayer):
    """One block's LoRAs: A [r, D] and B [W, r] at each target. The first block's keeps h₀ of the pass under way."""

    adapter_layer_names = tuple(f"{PREFIX}{part}_{target}" for target in TARGETS for part in "ab")

    def __init__(self, index: int, layer_sites: LayerSites, first: DeltaLayer | None = None) -> None:
        super().__init__(index, layer_sites, first)
        self.initial: torch.Tensor | None = None  # h₀ [B, T, D]
        if first is None:
            self._handles.append(layer_sites.block.register_forward_pre_hook(self._keep, with_kwargs=True))

    def update_layer(self, adapter_name: str, config: SiboConfig) -> None:
        """Add a fresh adapter, which changes nothing: B = 0."""
        for target in config.targets:
            a = torch.empty(config.r, self.inputs(target), **self.fresh())
            b = torch.zeros(self.layer_sites.linears[target].width, config.r, **self.fresh())
            self._part("a", target)[adapter_name] = nn.Parameter(nn.init.kaiming_uniform_(a, a=5**0.5))
            self._part("b", target)[adapter_name] = nn.Parameter(b)
        self.configs[adapter_name] = config

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, W]."""
        config, initial = self.configs[name], self.first.initial
        assert initial is not None, "a block was called outside its model"
        mixed = (1 - config.residual) * x + config.residual * initial.to(x.device).float()
        added: torch.Tensor = (
            mixed @ self._part("a", target)[name].T @ self._part("b", target)[name].T * (config.alpha / config.r)
        )
        return added

    def _part(self, part: str, target: str) -> nn.ParameterDict:
        held: nn.ParameterDict = getattr(self, f"{PREFIX}{part}_{target}")
        return held

    def _keep(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.initial = args[0] if args else kwargs["hidden_states"]


class SiboModel(DeltaTuner):
    """The tuner that PEFT builds for a SiboConfig."""

    prefix = PREFIX
    tuner_layer_cls = SiboLayer
    child = "boosters"
    no_merge = "SIBO's LoRAs also read the first representation, which no weight sees"


def _build(
    model_config: ModelConfig,
    *,
    r: int = 8,
    alpha: int = 16,
    residual: float = 0.2,
    targets: list[str] | None = None,
) -> SiboConfig:
    paths = projection_paths(model_config)
    chosen = tuple(target for target in TARGETS if target in paths) if targets is None else names_in("targets", targets)
    return SiboConfig(r=r, alpha=alpha, residual=residual, targets=chosen)


register(SiboConfig, SiboModel, "sibo")

METHOD = Method(
    name="sibo",
    title="LoRA-SIBO",
    source="Wen et al. 2024, arXiv 2402.11896",
    equation="y ← y + (α/r) B A ((1 − λ) x + λ h₀)",
    build=_build,
    mergeable=False,
    identity_at_init=True,
)
