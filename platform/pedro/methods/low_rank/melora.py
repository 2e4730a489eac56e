"""MELoRA as a PEFT tuner (Ren et al. 2024, arXiv 2402.17263): n small LoRAs, one beside the other on the diagonal.

ΔW = (α/r) diag(B_1 … B_n) diag(A_1 … A_n): mini LoRA i reads the i-th piece of the input and writes the
i-th piece of the output. The rank is n r at the parameters of a LoRA of rank r.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from pedro.methods.low_rank.base import (
    Factors,
    Linear,
    LowRankConfig,
    LowRankLayer,
    LowRankTuner,
    Tensors,
    low_rank_reader,
    names,
)
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect, expect_count, targets_of
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

PREFIX = "melora_"


@dataclass
class MeloraConfig(LowRankConfig):
    """Options of MELoRA. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "MELORA"

    r: int = field(default=8, metadata={"help": "Rank of each mini LoRA."})
    n: int = field(default=2, metadata={"help": "Number of mini LoRAs."})
    alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "n", "alpha"):
            expect_count(name, getattr(self, name))

    def shapes(self, linear: Linear) -> dict[str, tuple[int, ...]]:
        """A and B of the n mini LoRAs, stacked."""
        whole = linear.inputs % self.n == 0 and linear.width % self.n == 0
        expect(whole, "n", f"a divisor of {linear.target}'s {linear.inputs} inputs and {linear.width} outputs", self.n)
        return {
            f"a_{linear.target}": (self.n, self.r, linear.inputs // self.n),
            f"b_{linear.target}": (self.n, linear.width // self.n, self.r),
        }

    def start(self, name: str, tensor: torch.Tensor) -> None:
        """A as LoRA's, each of them; B stays zero, so that a fresh adapter changes nothing."""
        if name.startswith("a_"):
            for mini in tensor:
                torch.nn.init.kaiming_uniform_(mini, a=5**0.5)

    def factors(self, tensors: Tensors, linear: Linear) -> Factors:
        """The block diagonals, scaled."""
        a = torch.block_diag(*tensors[f"a_{linear.target}"]).T  # [in, n r]
        b = torch.block_diag(*tensors[f"b_{linear.target}"]).T  # [n r, W]
        return a, b * (self.alpha / self.r)


class MeloraLayer(LowRankLayer):
    """One block's mini LoRAs: "melora_a_<target>" [n, r, in/n] and "melora_b_<target>" [n, W/n, r]."""

    prefix = PREFIX
    adapter_layer_names = names(PREFIX, ("a", "b"))

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """As its factors say, piece by piece, without the zeros of the block diagonals."""
        config, (a, b) = self.configs[name], self.tensors(name, target).values()
        narrow = torch.einsum("...ni,nri->...nr", x.unflatten(-1, (config.n, -1)), a)
        wide: torch.Tensor = torch.einsum("...nr,nor->...no", narrow, b).flatten(-2) * (config.alpha / config.r)
        return wide


class MeloraModel(LowRankTuner):
    """The tuner that PEFT builds for a MeloraConfig."""

    prefix = PREFIX
    tuner_layer_cls = MeloraLayer
    child = "mini_loras"


def _build(
    model_config: ModelConfig, *, r: int = 8, n: int = 2, alpha: int = 16, targets: Targets = None
) -> MeloraConfig:
    return MeloraConfig(r=r, n=n, alpha=alpha, targets=targets_of(model_config, targets))


register(MeloraConfig, MeloraModel, "melora")

METHOD = Method(
    name="melora",
    title="MELoRA",
    source="Ren et al. 2024, arXiv 2402.17263",
    equation="y ← y + (α/r) diag(B₁ … Bₙ) diag(A₁ … Aₙ) x",
    build=_build,
    readers=(low_rank_reader(MeloraConfig, MeloraModel),),
    mergeable=True,
    identity_at_init=True,
)
