"""Full fine-tuning: every weight of the backbone is trained, and no PEFT config is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.methods.method import Method

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig


def _build(_model_config: ModelConfig) -> None:
    return None


METHOD = Method(
    name="full",
    title="Full fine-tuning",
    source="every weight of the backbone",
    equation="W ← W + ΔW",
    build=_build,
    mergeable=True,
    identity_at_init=True,
)
