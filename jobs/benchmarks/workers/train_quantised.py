"""Steps of fine-tuning over a backbone whose weights are held in one way or another, and the memory they take."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.workers.train import LocalCheckpoints, spec_of
from pedro.backbone import quiet
from pedro.methods import get_method
from pedro.process import peak_memory, release_freed_memory, reset_peak_memory, resident_memory
from pedro.training.context import build_context
from pedro.training.loop import train
from pedro.training.worker import save_model


class QuantisedTrainer:
    """Set-up: as of OurTrainer, and `training`, what of a spec says how weights are held."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import datasets  # noqa: F401 (libraries, none of the memory that is counted)
        import transformers.models.llama.modeling_llama  # noqa: F401

        torch.set_num_threads(setup["threads"])
        quiet()
        spec = spec_of(setup, setup["method"])
        fields = spec.to_dict()
        self._spec = spec.model_validate({**fields, "training": {**fields["training"], **setup["training"]}})
        get_method(self._spec.method.name)

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """Load, train, validate, checkpoint, save."""
        folder = Path(tempfile.mkdtemp())
        release_freed_memory()
        reset_peak_memory()
        before = resident_memory()
        context = build_context(self._spec, folder / "cache")
        frozen = [p for p in context.model.parameters() if not p.requires_grad]
        loaded, began = peak_memory() - before, time.perf_counter()
        outcome = train(context.engine, context.alternation, context.plan, context.data, LocalCheckpoints(folder))
        seconds = (time.perf_counter() - began) / outcome.optimizer_steps
        save_model(context, {}, folder / "adapter")
        return {
            "weights": sum(p.numel() * p.element_size() for p in frozen),
            "loaded": loaded,
            "peak": peak_memory() - before,
            "step_s": seconds,
            "loss": outcome.validation_loss if outcome.validation_loss is not None else math.nan,
        }
