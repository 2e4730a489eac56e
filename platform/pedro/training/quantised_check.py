"""Which jobs may train over a backbone in 8 or 4 bit (`training.backbone_dtype`), as far as specs say. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pedro.training.spec import FineTuneSpec

READING = ("ether", "ether-plus", "gift", "loretta")
"""Methods that compute with the backbone's weights at every step, and so would have all of them whole at once."""
PEFT_TYPES = (
    *("ADALORA", "FOURIERFT", "IA3", "LN_TUNING", "LORA", "MISS", "PREFIX_TUNING"),
    *("PROMPT_TUNING", "P_TUNING", "RANDLORA", "VBLORA", "VERA"),
)
"""Types of PEFT of which the same is known not to hold (a test trains each)."""


def must_be_whole(kind: str, method: str, options: Mapping[str, Any], zero_stage: int = 0) -> str:
    """Why a method cannot train so, with the remedy; empty if it can."""
    peft_type = options.get("peft_type") if method == "peft" else None
    reads = "computes with the backbone's whole weights at every step"
    doubts = [
        (method == "full", "method full trains the weights themselves; take an adapter's method"),
        (method in READING, f"method {method} {reads}; take another method"),
        (
            isinstance(peft_type, str) and peft_type not in PEFT_TYPES,
            f"method.peft_type {peft_type} is not among those that leave the weights alone; take one of "
            f"{', '.join(PEFT_TYPES)}",
        ),
        (
            peft_type == "MISS" and options.get("init_weights") == "bat",
            f"method.init_weights bat {reads}; leave it out",
        ),
        (bool(options.get("use_dora")), f"method.use_dora {reads}; leave it out"),
        (bool(options.get("modules_to_save")), "method.modules_to_save trains the backbone's own; leave it out"),
        (bool(options.get("target_parameters")), "method.target_parameters changes the weights; name target_modules"),
        (zero_stage == 3, "resources.zero_stage 3 cuts each weight in pieces, with their scales apart; use at most 2"),
    ]
    return next((f"{kind}: {why}, or leave backbone_dtype out" for applies, why in doubts if applies), "")


def why_whole(spec: FineTuneSpec) -> str:
    """Why a job cannot train so; empty if it can, or does not ask."""
    kind = spec.training.backbone_dtype
    return must_be_whole(kind, spec.method.name, spec.method.options, spec.resources.zero_stage) if kind else ""
