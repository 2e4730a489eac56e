"""LoRA-Dash as a PEFT tuner (Si et al. 2024, arXiv 2409.01035): LoRA, and a dash along task-specific directions.

First t steps of LoRA alone (the pre-launch). Then, for each weight W = U Σ Vᵀ, the s directions with the highest
change rate |u_iᵀ ΔW v_i| / σ_i are chosen, ΔW = (α/r) B A so far; they are frozen, and their coordinates Δσ, zero at
first, are trained beside A and B: W ← W + (α/r) B A + Σ_i Δσ_i u_i v_iᵀ. A LoRA's parameters and s more a projection.
The dash is the method's `TrainingHook`.
Shapes: W output width of a projection, k = min(W, in).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

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

PREFIX = "lora_dash_"
FROZEN = ("u", "v")


@dataclass
class LoraDashConfig(LowRankConfig):
    """Options of LoRA-Dash. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "LORA_DASH"

    r: int = field(default=8, metadata={"help": "LoRA's rank."})
    alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})
    directions: int = field(default=8, metadata={"help": "Number s of task-specific directions a projection."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "alpha", "directions"):
            expect_count(name, getattr(self, name))

    def shapes(self, linear: Linear) -> dict[str, tuple[int, ...]]:
        """LoRA's A and B, the frozen directions, and their coordinates."""
        count, least = self.directions, min(linear.inputs, linear.width)
        expect(count <= least, "directions", f"at most {least}, the directions of {linear.target}", count)
        return {
            f"a_{linear.target}": (self.r, linear.inputs),
            f"b_{linear.target}": (linear.width, self.r),
            f"sigma_{linear.target}": (count,),
            f"u_{linear.target}": (linear.width, count),
            f"v_{linear.target}": (count, linear.inputs),
        }

    def start(self, name: str, tensor: torch.Tensor) -> None:
        """A as LoRA's; all else stays zero, so that a fresh adapter changes nothing."""
        if name.startswith("a_"):
            torch.nn.init.kaiming_uniform_(tensor, a=5**0.5)

    def factors(self, tensors: Tensors, linear: Linear) -> Factors:
        """LoRA's, and the directions after them."""
        a, b, sigma, u, v = (tensors[f"{name}_{linear.target}"] for name in ("a", "b", "sigma", "u", "v"))
        return torch.cat([a, v]).T, torch.cat([b * (self.alpha / self.r), u * sigma], dim=1).T


class LoraDashLayer(LowRankLayer):
    """One block's tensors: at target t, A [r, in], B [W, r], Δσ [s] and, frozen, U [W, s] and Vᵀ [s, in]."""

    prefix = PREFIX
    adapter_layer_names = names(PREFIX, ("a", "b", "sigma"))
    frozen_names = names(PREFIX, FROZEN)

    @torch.no_grad()
    def launch(self, adapter_name: str) -> None:
        """Choose the directions by what A and B have learned until now."""
        for target in self.configs[adapter_name].targets:
            left, sigma, right = torch.linalg.svd(self.base_weight(target), full_matrices=False)  # [W, k], [k], [k, in]
            tensors = self.tensors(adapter_name, target)
            learned = (left.T @ tensors[f"b_{target}"]) * (right @ tensors[f"a_{target}"].T)  # [k, r]
            floor = torch.finfo(sigma.dtype).eps * sigma[0]  # of a weight whose rank is not full, 0 / 0 is no rate
            rate = learned.sum(1).abs() / sigma.clamp_min(floor)  # the scaling α/r is the same for all
            chosen = rate.topk(self.configs[adapter_name].directions).indices
            tensors[f"u_{target}"].copy_(left[:, chosen])
            tensors[f"v_{target}"].copy_(right[chosen])


class LoraDashModel(LowRankTuner):
    """The tuner that PEFT builds for a LoraDashConfig."""

    prefix = PREFIX
    tuner_layer_cls = LoraDashLayer
    child = "dashes"


class Launch:
    """The `TrainingHook` of a LoRA-Dash adapter: chooses the directions after step `launch`."""

    def __init__(self, model: Any, steps: int, launch: int) -> None:
        expect(launch < steps, "method.launch", f"less than the {steps} steps of the run", launch)
        self.layers: list[LoraDashLayer] = list(model.base_model.layers())
        self.trained: int = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.at = launch

    def penalty(self) -> None:
        """Nothing is added to the loss."""
        return None

    def after_step(self, step: int) -> None:
        """Launch, once."""
        if step == self.at:
            for layer in self.layers:
                layer.launch("default")

    def settled(self, step: int) -> bool:
        """Whether the directions are chosen."""
        return step >= self.at

    def finish(self) -> None:
        """Nothing: the directions are saved with the adapter."""

    def kept(self) -> int:
        """All that is trained."""
        return self.trained

    def state(self) -> dict[str, torch.Tensor]:
        """The directions, which are no parameters."""
        return {key: held["default"] for key, held in self._held()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over the directions of a checkpoint."""
        for key, held in self._held():
            held["default"].copy_(state[key])

    def _held(self) -> list[tuple[str, Any]]:
        held = [(layer, name) for layer in self.layers for name in layer.frozen_names]
        return [
            (f"{layer.index}.{name}", getattr(layer, name)) for layer, name in held if "default" in getattr(layer, name)
        ]


def _build(
    model_config: ModelConfig,
    *,
    r: int = 8,
    alpha: int = 16,
    directions: int = 8,
    launch: int = 100,
    targets: Targets = None,
) -> LoraDashConfig:
    """`launch`: the steps t of LoRA alone, read by the hook."""
    expect_count("launch", launch)
    return LoraDashConfig(r=r, alpha=alpha, directions=directions, targets=targets_of(model_config, targets))


register(LoraDashConfig, LoraDashModel, "lora-dash")

METHOD = Method(
    name="lora-dash",
    title="LoRA-Dash",
    source="Si et al. 2024, arXiv 2409.01035",
    equation="y ← y + ((α/r) B A + Σᵢ Δσᵢ uᵢ vᵢᵀ) x",
    build=_build,
    readers=(low_rank_reader(LoraDashConfig, LoraDashModel),),
    mergeable=True,
    identity_at_init=True,
    make_hook=lambda model, steps, options: Launch(model, steps, options["launch"]),
)
