"""The DeepSpeed configuration of a job. Does not import DeepSpeed.

The frozen backbone already has its compute dtype, and adapter parameters are float32: the configuration must not have a
`bf16` block, since it would round the adapter's parameters (above all Θ) to bf16. Only `full` in bf16, which trains the
backbone itself, uses DeepSpeed's bf16 with float32 masters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BUCKET = 25_000_000  # most gradients that workers sum at once; DeepSpeed sets aside 500 million, on a GPU all at once


def deepspeed_config(
    *,
    slice_rows: int,
    accumulation: int,
    world: int,
    zero_stage: int,
    clip: float,
    bf16_masters: bool,
    on_gpu: bool = False,
    trained: Sequence[int] = (),
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    slice_rows: nominal rows of one worker's slice; only used by DeepSpeed's throughput numbers.
    bf16_masters: the trained parameters are bf16 (method `full` with precision bf16).
    trained: the sizes of the tensors that are trained, where they are known.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": slice_rows,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": slice_rows * accumulation * world,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,  # GroupedAdamW; equal to plain AdamW in every stage (tests)
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    stage = max(zero_stage, 1) if bf16_masters else zero_stage
    if stage:
        config["zero_optimization"] = {"stage": stage, "overlap_comm": False}
        if trained:
            config["zero_optimization"]["reduce_bucket_size"] = max(*trained, min(sum(trained), BUCKET))
    if stage == 3:
        # Small adapter parameters are partitioned like the rest: one rule for saving, whatever their size.
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "round_robin_gradients": False}
        if not on_gpu:  # no prefetching: a tensor is only gathered while it is used
            none_longer = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
            config["zero_optimization"] |= dict.fromkeys(none_longer, 0)
    if bf16_masters:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
