"""(IA)³, BitFit and RED as methods: names, options, capabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import IA3Config

from pedro.methods.architectures import projection_paths
from pedro.methods.constants.config import ConstantConfig
from pedro.methods.constants.model import ConstantModel
from pedro.methods.constants.reader import CONSTANT_READER, IA3_READER
from pedro.methods.method import Method
from pedro.methods.options import Targets, paths_of, targets_of
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig


def _build_ia3(model_config: ModelConfig, *, r: int | None = None) -> IA3Config | ConstantConfig:
    if r is not None:
        projection_paths(model_config)
        return ConstantConfig(scale=("k", "v", "up"), r=r)
    return IA3Config(
        target_modules=paths_of(model_config, ["k", "v", "down"]),
        feedforward_modules=paths_of(model_config, ["down"]),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def _build_bitfit(model_config: ModelConfig, *, r: int | None = None, targets: Targets = None) -> ConstantConfig:
    return ConstantConfig(shift=targets_of(model_config, targets), r=r)


def _build_red(model_config: ModelConfig) -> ConstantConfig:
    projection_paths(model_config)
    return ConstantConfig(scale=("down",), shift=("down",))


register(ConstantConfig, ConstantModel)

IA3 = Method(
    name="ia3",
    title="(IA)³",
    source="Liu et al. 2022, arXiv 2205.05638",
    equation="y ← l ⊙ y; with r: l = 1 + z P",
    build=_build_ia3,
    readers=(IA3_READER, CONSTANT_READER),
    mergeable=True,
    identity_at_init=True,
    paper={"r": 16},
)
BITFIT = Method(
    name="bitfit",
    title="BitFit",
    source="Ben Zaken et al. 2021, arXiv 2106.10199",
    equation="y ← y + b; with r: b = z P",
    build=_build_bitfit,
    readers=(CONSTANT_READER,),
    mergeable=False,
    identity_at_init=True,
    paper={"r": 8},
)
RED = Method(
    name="red",
    title="RED",
    source="Wu et al. 2024, arXiv 2402.15179",
    equation="h ← s ⊙ h + b, on the feed-forward's output",
    build=_build_red,
    readers=(CONSTANT_READER,),
    mergeable=False,
    identity_at_init=True,
)
METHODS = (IA3, BITFIT, RED)
