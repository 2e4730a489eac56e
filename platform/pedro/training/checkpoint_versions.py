"""Checkpoints of a running job as versions, created by its driver: the last few of a job and its best.

Such a version is like any other, with its own run below the job's; its gate field names the job and the step. No alias
moves to it automatically. It is deleted when newer ones are created, and at the latest with its job's row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import ConflictError, NotFoundError
from pedro.store import CHECKPOINT, checkpoint_gate, checkpoint_of

if TYPE_CHECKING:
    from pedro.refs import ModelRef
    from pedro.registry import Registry
    from pedro.store import JobEvent

LAST = 3
"""How many are kept besides the best one, as at OpenAI."""


def publish(
    registry: Registry, ref: ModelRef, job_id: str, run_id: str, directory: Path, made: Mapping[str, Any]
) -> None:
    """Register a checkpoint's adapter as a version; `made` is the result of `CheckpointModels.save`, `run_id` the
    job's.

    Each step is told of once: a job that went back behind a damaged checkpoint comes by a step again, with the same
    bits, and a driver takes up what the one before it may have published.
    """
    step = made["step"]
    gate = checkpoint_gate(job_id, step)
    if any(event.data and event.data["step"] == step for event in _told(registry, job_id)):
        return
    version = next((version for version in registry.versions(ref.name) if version.gate == gate), None)
    if version is None:
        run = registry.start_run(
            experiment=ref.name,
            name=f"{job_id} step {step}",
            params={},
            tags={"checkpoint_of": job_id, "model": ref.name},
            parent=run_id,
        )
        try:
            version = registry.register(run, directory, ref.tenant, ref.adapter, gate=gate)
        finally:
            registry.finish_run(run)
    data = {"model": version.ref, "step": step, "metrics": made["metrics"]}
    registry.store.add_job_event(job_id, f"Checkpoint created at step {step:,}", kind=CHECKPOINT, data=data)
    drop_old(registry, ref.name, job_id, made["best_step"])


def _told(registry: Registry, job_id: str) -> list[JobEvent]:
    return registry.store.list_job_events(job_id, (CHECKPOINT,), limit=100)


def drop_old(registry: Registry, name: str, job_id: str, best_step: int) -> None:
    """Delete a job's checkpoints except the last few, the best, and those with an alias or from which a job
    continues."""
    found = {}
    for version in registry.versions(name):
        if (of := checkpoint_of(version.gate)) is not None and of.job_id == job_id:
            found[of.step] = version
    for step in sorted(found)[:-LAST]:
        if step == best_step:
            continue
        try:
            registry.retire(name, found[step].version, actor=f"job:{job_id}")
        except (ConflictError, NotFoundError):
            continue
        registry.store.forget_checkpoint(job_id, found[step].ref)
