"""Which jobs may train together in one worker (`resources.share`), by their specs. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pedro.training.spec import FineTuneSpec

METHODS = (
    *("pedro", *(f"pedro-{variant}" for variant in range(1, 8)), "para"),
    *("lora", "ia3", "red", "bitfit"),
)
MOST_JOBS = 8
MOST_ROWS = 256
"""Limit per pass, since a group's memory besides the backbone grows with its rows."""


def why_alone(spec: FineTuneSpec) -> str:
    """Why the job cannot share a worker, with the remedy; empty if it can."""
    method, options = spec.method.name, spec.method.options
    alone = [
        (method not in METHODS, f"method {method} cannot share; methods that can are {', '.join(METHODS)}"),
        (spec.objective != "supervised", f"objective {spec.objective} cannot share"),
        (
            spec.resources.workers > 1,
            f"jobs share one worker, not {spec.resources.workers} (resources.workers)",
        ),
        (spec.resources.zero_stage > 0, f"resources.zero_stage {spec.resources.zero_stage} shards one job's state"),
        (spec.training.gradient_checkpointing, "training.gradient_checkpointing repeats the passes of one job alone"),
        (
            bool(options.get("dropout")),
            "method.dropout would draw random numbers that depend on other jobs; set it to 0",
        ),
        (
            options.get("conditioning") == "system" and not options.get("head_end"),
            "conditioning: system finds head_end in each job's own data; set method.head_end",
        ),
    ]
    return next((f"{reason}; leave it false" for applies, reason in alone if applies), "")


def group_key(spec: Mapping[str, Any], tenant: str | None = None) -> str | None:
    """Jobs with the same key may train together. For a resolved spec from the store; None if it does not share.

    The key has backbone, method with options, precision (of the projections, too), resources, the approximate maximum
    length of rows, to which others are padded, and whether they must be; `tenant` is part of it if only jobs of one
    tenant may share.
    """
    resources = spec.get("resources") or {}
    if not resources.get("share"):
        return None
    training = spec.get("training") or {}
    precision, longest = training.get("precision", "fp32"), int(training.get("max_length") or 0)
    precision = [precision, kind] if (kind := training.get("backbone_dtype")) else precision
    padded = not training.get("packing", True)
    parts = [spec.get("backbone"), spec.get("method"), precision, longest.bit_length(), padded, resources, tenant]
    return json.dumps(parts, sort_keys=True)


def rows_of_pass(spec: Mapping[str, Any]) -> int:
    """The job's rows per pass."""
    training = spec.get("training") or {}
    return -(-int(training.get("batch_size", 16)) // int(training.get("gradient_accumulation", 1)))
