"""P-tuning v2, which PEFT has as prefix tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import PrefixTuningConfig

from pedro.methods.architectures import projection_paths
from pedro.methods.method import Method
from pedro.methods.options import expect_count

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig


def _build(model_config: ModelConfig, *, tokens: int = 64) -> PrefixTuningConfig:
    expect_count("tokens", tokens)
    projection_paths(model_config)
    return PrefixTuningConfig(num_virtual_tokens=tokens)


METHOD = Method(
    name="p-tuning-v2",
    title="P-tuning v2",
    source="Liu et al. 2021, arXiv 2110.07602",
    equation="K ← [P_K; K], V ← [P_V; V] in every layer",
    build=_build,
    mergeable=False,
    identity_at_init=False,
)
