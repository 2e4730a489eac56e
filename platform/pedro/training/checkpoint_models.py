"""Checkpoints of a running job as models, the workers' part: saves an adapter beside the checkpoint.

The driver makes it a version (`checkpoint_versions.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.evaluation.saved import trains_backbone
from pedro.methods.servable import check_servable
from pedro.training.job_events import measured_at
from pedro.training.waiting_checkpoints import MADE
from pedro.training.worker import save_model
from pedro.training.worker_group import WorkerGroup

if TYPE_CHECKING:
    from pedro.training.context import TrainingContext
    from pedro.training.loop import TrainState


class CheckpointModels:
    """Saves one job's checkpoints as adapters; called on every worker. Failures are logged; training continues."""

    def __init__(self, context: TrainingContext, say: Callable[[str], None]) -> None:
        self._context, self._say = context, say
        self._off = trains_backbone(context.model)  # whole models are not served

    def save(self, state: TrainState, directory: Path) -> dict[str, Any] | None:
        """The adapter of a checkpoint that was validated just now, and what the driver is to tell of it, which stands
        beside it, too: its step, the best one, metrics. None where it is no model, and on every worker but the first.
        """
        hook, group = self._context.engine.hook, WorkerGroup(self._context.engine.rank, self._context.engine.world)
        validated = bool(state.validations) and state.validations[-1][0] == state.step
        if self._off or not validated or (hook is not None and not hook.settled(state.step)):
            return None
        try:
            save_model(self._context, {"step": state.step, "validation_loss": state.validations[-1][1]}, directory)
            if group.rank:
                return None
            check_servable(directory, self._context.backbone)
            made = {"step": state.step, "best_step": state.best_step, "metrics": measured_at(state.step, state.told)}
            (directory.parent / MADE).write_text(json.dumps(made))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the training is worth more
            if group.rank == 0:
                self._say(f"the checkpoint of step {state.step:,} was not saved as a model: {error}")
            return None
        finally:
            self._context.engine.mode(training=True)
        return made
