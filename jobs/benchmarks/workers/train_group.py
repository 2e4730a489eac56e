"""One worker of a group that trains a few steps, and the most memory that this took it beside its libraries."""

from __future__ import annotations

import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.workers.train import LocalCheckpoints, spec_of
from pedro.backbone import quiet
from pedro.methods import get_method
from pedro.process import peak_memory, release_freed_memory, reset_peak_memory, resident_memory
from pedro.training.context import build_context, engine_for
from pedro.training.ds_engine import import_deepspeed
from pedro.training.loop import train
from pedro.training.worker import save_model
from pedro.training.worker_group import WorkerGroup


class GroupWorker:
    """Set-up: as of OurTrainer, and resources, rank and `group`, a file by which the workers find each other."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import transformers.models.llama.modeling_llama  # noqa: F401 (a library, none of the memory that is counted)

        torch.set_num_threads(1)
        quiet()
        self._spec = spec_of(setup, setup["method"]).model_copy()
        self._spec = self._spec.model_validate({**self._spec.to_dict(), "resources": setup["resources"]})
        rank, world = setup["rank"], self._spec.resources.workers
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        torch.distributed.init_process_group("gloo", f"file://{setup['group']}", rank=rank, world_size=world)
        import_deepspeed()
        get_method(self._spec.method.name)
        self._group = WorkerGroup(rank, world)

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """Load, train, validate, checkpoint, save."""
        spec, folder = self._spec, Path(tempfile.mkdtemp())
        release_freed_memory()
        reset_peak_memory()
        before = resident_memory()
        context = build_context(spec, folder / "cache", engine_for(spec), self._group)
        loaded, began = peak_memory() - before, time.perf_counter()
        outcome = train(context.engine, context.alternation, context.plan, context.data, LocalCheckpoints(folder))
        seconds = (time.perf_counter() - began) / outcome.optimizer_steps
        save_model(context, {}, folder / "adapter")
        loss = outcome.validation_loss if outcome.validation_loss is not None else math.nan
        return {"peak": peak_memory() - before, "loaded": loaded, "step_s": seconds, "loss": loss}
