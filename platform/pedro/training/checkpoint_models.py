"""Checkpoints of a running job as models: versions that can be asked for at once, the last few of a job and its best.

Such a version is like any other, with a run of its own below the job's; what its gate says names the job and the step.
No alias moves to it by itself, it goes when newer ones come, and at the latest with the row of its job.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import ConflictError, NotFoundError
from pedro.evaluation.saved import trains_backbone
from pedro.methods.servable import check_servable
from pedro.store import CHECKPOINT, checkpoint_gate, checkpoint_of
from pedro.training.job_events import measured_at
from pedro.training.worker import save_model
from pedro.training.worker_group import WorkerGroup

if TYPE_CHECKING:
    from pedro.registry import Registry
    from pedro.training.context import TrainingContext
    from pedro.training.loop import TrainState

LAST = 3
"""So many are kept beside the best one, as OpenAI keeps them."""


class CheckpointModels:
    """Makes versions of one job's checkpoints; every worker calls it alike. What fails is told; training goes on."""

    def __init__(
        self, context: TrainingContext, registry: Registry, job_id: str, run_id: str, say: Callable[[str], None]
    ) -> None:
        """`run_id` is the job's own run."""
        self._context, self._registry = context, registry
        self._job_id, self._run_id, self._say = job_id, run_id, say
        self._off = trains_backbone(context.model)  # a whole model is not served beside others

    def add(self, state: TrainState) -> None:
        """A checkpoint was kept: if it was validated just now, it becomes a version."""
        hook, group = self._context.engine.hook, WorkerGroup(self._context.engine.rank, self._context.engine.world)
        validated = bool(state.validations) and state.validations[-1][0] == state.step
        if self._off or not validated or (hook is not None and not hook.settled(state.step)):
            return
        metrics = {"step": state.step, "validation_loss": state.validations[-1][1]}
        try:
            with tempfile.TemporaryDirectory() as folder:
                save_model(self._context, metrics, Path(folder) / "adapter")
                if group.rank == 0:
                    self._publish(Path(folder) / "adapter", state)
        except Exception as error:  # noqa: BLE001 - whatever the tracking server's client raises
            if group.rank == 0:
                self._say(f"the checkpoint of step {state.step:,} is no model: {error}")
        finally:
            self._context.engine.mode(training=True)

    def _publish(self, directory: Path, state: TrainState) -> None:
        spec, registry, step = self._context.spec, self._registry, state.step
        check_servable(directory, self._context.backbone)
        run = registry.start_run(
            experiment=spec.name,
            name=f"{self._job_id} step {step}",
            params={},
            tags={"checkpoint_of": self._job_id, "model": spec.name},
            parent=self._run_id,
        )
        try:
            gate = checkpoint_gate(self._job_id, step)
            version = registry.register(run, directory, spec.tenant, spec.adapter, gate=gate)
        finally:
            registry.finish_run(run)
        data: dict[str, Any] = {"model": version.ref, "step": step, "metrics": measured_at(step, state.told)}
        registry.store.add_job_event(self._job_id, f"Checkpoint created at step {step:,}", kind=CHECKPOINT, data=data)
        drop_old(registry, spec.name, self._job_id, state.best_step)


def drop_old(registry: Registry, name: str, job_id: str, best_step: int) -> None:
    """Delete a job's checkpoints but the last few and the best; what an alias names, or a job goes on from, stays."""
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
