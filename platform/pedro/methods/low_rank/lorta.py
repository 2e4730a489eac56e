"""LoRTA as a PEFT tuner (Hounie et al. 2024, arXiv 2410.04060): all changes are slices of one low-rank tensor.

The changes of q, k, v and o, of every head and layer, form one tensor with the modes input D, head width, head, layer
and matrix; a CP model of rank r shares its factors A, B, C_H, C_L, C_M among them all:
ΔW of head h in layer l and matrix m = (α/r) A diag(C_H[h] ⊙ C_L[l] ⊙ C_M[m]) Bᵀ, for o transposed. r (D + D_h + H + L +
M) parameters. It needs as many heads in each matrix, so k and v are left out where they have fewer than q.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from pedro.methods.architectures import projection_paths
from pedro.methods.low_rank.base import (
    Factors,
    Linear,
    LowRankConfig,
    LowRankLayer,
    LowRankTuner,
    Tensors,
    low_rank_reader,
)
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect, expect_count, expect_names, names_in
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

PREFIX = "lorta_"
MATRICES = ("q", "k", "v", "o")


@dataclass
class LortaConfig(LowRankConfig):
    """Options of LoRTA. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "LORTA"
    shared: ClassVar[bool] = True

    targets: tuple[str, ...] = field(
        default=MATRICES, metadata={"help": f"Matrices of the tensor, of {', '.join(MATRICES)}."}
    )
    r: int = field(default=8, metadata={"help": "Rank of the tensor."})
    alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})
    heads: int = field(default=1, metadata={"help": "The backbone's heads."})
    layers: int = field(default=1, metadata={"help": "The backbone's layers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_names("targets", self.targets, MATRICES)
        for name in ("r", "alpha", "heads", "layers"):
            expect_count(name, getattr(self, name))

    def shapes(self, linear: Linear) -> dict[str, tuple[int, ...]]:
        """The five factors, the same for every projection."""
        hidden, inner = self._sides(linear)
        expect(inner % self.heads == 0, "heads", f"a divisor of {inner}, the width of {linear.target}", self.heads)
        expect(linear.layer < self.layers, "layers", "as many as the backbone has", self.layers)
        return {
            "input": (hidden, self.r),
            "width": (inner // self.heads, self.r),
            "head": (self.heads, self.r),
            "layer": (self.layers, self.r),
            "matrix": (len(self.targets), self.r),
        }

    def start(self, name: str, tensor: torch.Tensor) -> None:
        """As the authors': A uniform, B zero, so that a fresh adapter changes nothing, the C normal."""
        if name == "input":
            torch.nn.init.kaiming_uniform_(tensor.T, a=5**0.5)
        elif name != "width":
            torch.nn.init.normal_(tensor)

    def factors(self, tensors: Tensors, linear: Linear) -> Factors:
        """One layer's matrix: its heads side by side."""
        mode = tensors["layer"][linear.layer] * tensors["matrix"][self.targets.index(linear.target)]  # [r]
        scale = mode * (self.alpha / self.r)
        wide = torch.einsum("hr,kr->rhk", tensors["head"] * scale, tensors["width"]).flatten(1)  # [r, H D_h]
        return (wide.T, tensors["input"].T) if linear.target == "o" else (tensors["input"], wide)

    def _sides(self, linear: Linear) -> tuple[int, int]:
        """The model's width and that of all heads."""
        return (linear.width, linear.inputs) if linear.target == "o" else (linear.inputs, linear.width)


class LortaLayer(LowRankLayer):
    """The first block's holds the factors: "input" A [D, r], "width" B [D_h, r], and C of "head", "layer", "matrix"."""

    prefix = PREFIX
    adapter_layer_names = tuple(PREFIX + name for name in ("input", "width", "head", "layer", "matrix"))


class LortaModel(LowRankTuner):
    """The tuner that PEFT builds for a LortaConfig."""

    prefix = PREFIX
    tuner_layer_cls = LortaLayer
    child = "cp_factors"


def _build(model_config: ModelConfig, *, r: int = 8, alpha: int = 16, targets: Targets = None) -> LortaConfig:
    projection_paths(model_config)
    heads = model_config.num_attention_heads
    kv_heads = getattr(model_config, "num_key_value_heads", None) or heads
    fitting = MATRICES if kv_heads == heads else ("q", "o")
    chosen = fitting if targets is None else names_in("targets", targets)
    expect_names("targets", chosen, MATRICES)
    why = f"matrices with {heads} heads, as q has, which k and v with {kv_heads} have not: {', '.join(fitting)}"
    expect(set(chosen) <= set(fitting), "targets", why, list(chosen))
    return LortaConfig(r=r, alpha=alpha, targets=chosen, heads=heads, layers=model_config.num_hidden_layers)


register(LortaConfig, LortaModel, "lorta")

METHOD = Method(
    name="lorta",
    title="LoRTA",
    source="Hounie et al. 2024, arXiv 2410.04060",
    equation="y_h ← y_h + (α/r) B diag(C_H[h] ⊙ C_L[l] ⊙ C_M[m]) Aᵀ x",
    build=_build,
    readers=(low_rank_reader(LortaConfig, LortaModel),),
    mergeable=True,
    identity_at_init=True,
)
