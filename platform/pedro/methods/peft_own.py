"""Methods that PEFT has and that need nothing of ours: LoRA, P-tuning v2; and full fine-tuning, which needs no PEFT.

Knows nothing of models or training.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PrefixTuningConfig

from pedro.methods.architectures import projection_paths
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect_count, expect_share, paths_of


def _build_lora(
    model_config: Any, *, r: int = 8, alpha: int = 16, dropout: float = 0.0, targets: Targets = None
) -> LoraConfig:
    expect_count("r", r)
    expect_count("alpha", alpha)
    expect_share("dropout", dropout)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=paths_of(model_config, targets),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def _build_p_tuning(model_config: Any, *, tokens: int = 64) -> PrefixTuningConfig:
    expect_count("tokens", tokens)
    projection_paths(model_config)
    return PrefixTuningConfig(num_virtual_tokens=tokens)


def _build_full(model_config: Any) -> None:
    return None


LORA = Method(
    name="lora",
    title="LoRA",
    source="Hu et al. 2021, arXiv 2106.09685",
    equation="y ← y + (α/r) B A x",
    build=_build_lora,
    engine=True,
    mergeable=True,
    identity_at_init=True,
    paper={"r": 4},
)
P_TUNING_V2 = Method(
    name="p-tuning-v2",
    title="P-tuning v2",
    source="Liu et al. 2021, arXiv 2110.07602",
    equation="K ← [P_K; K], V ← [P_V; V] in every layer",
    build=_build_p_tuning,
    engine=False,
    mergeable=False,
    identity_at_init=False,
)
FULL = Method(
    name="full",
    title="Full fine-tuning",
    source="every weight of the backbone",
    equation="W ← W + ΔW",
    build=_build_full,
    engine=False,
    mergeable=True,
    identity_at_init=True,
)
