"""GIFT as a PEFT tuner (Savadikar et al. 2023, arXiv 2312.00700v3): changes are made from the weights themselves.

ω̂ = ω (I + φ ψ) with φ [in, r] and ψ [r, in] (abstract), shared by the layers, one pair for each kind of projection:
2 r in parameters a kind. It multiplies the backbone's weights, so it is served only where it was merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from pedro.methods.low_rank.base import Factors, Linear, LowRankConfig, LowRankLayer, LowRankTuner, Tensors, names
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect_count, targets_of
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

PREFIX = "gift_"


@dataclass
class GiftConfig(LowRankConfig):
    """Options of GIFT. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "GIFT"
    shared: ClassVar[bool] = True

    r: int = field(default=16, metadata={"help": "Rank of φ ψ."})

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("r", self.r)

    def shapes(self, linear: Linear) -> dict[str, tuple[int, ...]]:
        """φ and ψ of one kind of projection."""
        return {f"phi_{linear.target}": (linear.inputs, self.r), f"psi_{linear.target}": (self.r, linear.inputs)}

    def start(self, name: str, tensor: torch.Tensor) -> None:
        """φ as a linear layer's; ψ stays zero, so that a fresh adapter changes nothing."""
        if name.startswith("phi_"):
            torch.nn.init.kaiming_uniform_(tensor.T, a=5**0.5)

    def factors(self, tensors: Tensors, linear: Linear) -> Factors:
        """ψᵀ, and φ seen through the weight."""
        assert linear.weight is not None, "GIFT's change is made from the weight"
        return tensors[f"psi_{linear.target}"].T, (linear.weight() @ tensors[f"phi_{linear.target}"]).T


class GiftLayer(LowRankLayer):
    """The first block's holds the pairs: "gift_phi_<target>" and "gift_psi_<target>"."""

    prefix = PREFIX
    adapter_layer_names = names(PREFIX, ("phi", "psi"))


class GiftModel(LowRankTuner):
    """The tuner that PEFT builds for a GiftConfig."""

    prefix = PREFIX
    tuner_layer_cls = GiftLayer
    child = "gifts"


def _build(model_config: ModelConfig, *, r: int = 16, targets: Targets = ("q", "v")) -> GiftConfig:
    return GiftConfig(r=r, targets=targets_of(model_config, targets))


register(GiftConfig, GiftModel, "gift")

METHOD = Method(
    name="gift",
    title="GIFT",
    source="Savadikar et al. 2023, arXiv 2312.00700",
    equation="W ← W (I + φ ψ), shared by the layers",
    build=_build,
    mergeable=True,
    identity_at_init=True,
    paper={"r": 64},
    reads_weights=True,
)
