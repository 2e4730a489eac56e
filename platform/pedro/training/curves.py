"""The curves of a run: adds a worker's use of the machine to its training metrics, and records points."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pedro.process import peak_memory
from pedro.training.job_events import metrics_event

if TYPE_CHECKING:
    from pedro.registry import Registry


def log_point(registry: Registry, run_id: str, job_id: str, step: int, values: Mapping[str, float]) -> None:
    """Write a point to the run, its public part to the job's events, and the estimated end to the job's row."""
    from pedro.training.loop import SECONDS_LEFT

    if SECONDS_LEFT in values:
        registry.store.expect_end(job_id, time.time() + values[SECONDS_LEFT])
    registry.log_metrics(run_id, step, {name: value for name, value in values.items() if name != SECONDS_LEFT})
    if told := metrics_event(step, values):
        registry.store.add_job_event(job_id, told.message, kind="metrics", data=told.data)


def system_metrics() -> dict[str, float]:
    """This process's use of the machine: resident memory and its peak, CPU use since the last call, and peak GPU
    memory.
    """
    import torch

    process = _this_process()
    values = {
        "system/memory_mb": process.memory_info().rss / 2**20,
        "system/peak_memory_mb": peak_memory() / 2**20,
        "system/cpu_percent": process.cpu_percent(None),
    }
    if torch.cuda.is_available():
        values["system/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return values


@cache
def _this_process() -> Any:
    import psutil

    return psutil.Process()
