"""One worker of a group that trains a few steps, and the most memory that this took it beside its libraries."""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.workers.train import LocalCheckpoints, spec_of
from pedro.backbone import quiet
from pedro.process import (
    mapped_memory,
    peak_memory,
    proportional_memory,
    release_freed_memory,
    reset_peak_memory,
    resident_memory,
)
from pedro.training.context import TrainingContext, build_context, engine_for
from pedro.training.ds_engine import import_deepspeed
from pedro.training.loop import TrainingOutcome, train
from pedro.training.spec import FineTuneSpec
from pedro.training.worker import save_model
from pedro.training.worker_group import WorkerGroup

REHEARSED = "stories260K"


class GroupWorker:
    """Set-up: as of OurTrainer, resources and training as a spec has them, rank, and the file `group`, by which the
    workers find each other."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        quiet()
        plain = spec_of(setup, setup["method"]).to_dict()
        changes = {"resources": setup["resources"], "training": {**plain["training"], **setup["training"]}}
        self._spec = FineTuneSpec.model_validate({**plain, **changes})
        rank, world = setup["rank"], self._spec.resources.workers
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        torch.distributed.init_process_group("gloo", f"file://{setup['group']}", rank=rank, world_size=world)
        import_deepspeed()
        self._group = WorkerGroup(rank, world)
        self._train(self._spec.model_copy(update={"backbone": REHEARSED}))  # what libraries set up once is there now
        gc.collect()

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """Load, train, validate, checkpoint, save. `peak` is all that was resident at a time, `mapped` what of it are
        pages of files, `fair` what is resident at the end with shared pages shared out; `process` has the libraries."""
        release_freed_memory()
        reset_peak_memory()
        before, mapped, fair = resident_memory(), mapped_memory(), proportional_memory()
        began = time.perf_counter()
        context, outcome, loaded, seconds = self._train(self._spec)
        peak = peak_memory()
        return {
            "peak": peak - before,
            "process": peak,
            "loaded": loaded - before,
            "mapped": mapped_memory() - mapped,
            "fair": proportional_memory() - fair,
            "step_s": seconds / outcome.optimizer_steps,
            "all_s": time.perf_counter() - began,
            "loss": outcome.validation_loss if outcome.validation_loss is not None else math.nan,
            "trainable": context.trainable_parameters,
        }

    def _train(self, spec: FineTuneSpec) -> tuple[TrainingContext, TrainingOutcome, int, float]:
        """The end of a run, the peak of memory while it loaded, and the seconds of its steps."""
        folder = Path(tempfile.mkdtemp())
        context = build_context(spec, folder / "cache", engine_for(spec), self._group)
        loaded, began = peak_memory(), time.perf_counter()
        outcome = train(context.engine, context.alternation, context.plan, context.data, LocalCheckpoints(folder))
        seconds = time.perf_counter() - began
        save_model(context, {}, folder / "adapter")
        return context, outcome, loaded, seconds
