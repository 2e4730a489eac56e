"""Eight small fine-tunes of one backbone and method: one after the other, or together in one pass over the backbone.

Both take our training loop, the same rows, seeds and steps; both validate and write a checkpoint at the end, and then
the adapter. Loading the backbone and reading the rows are not timed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.workers.train import LocalCheckpoints, spec_of
from pedro.backbone import quiet
from pedro.training.context import TrainingContext, build_context
from pedro.training.cotraining.coordinator import Participant, PassCoordinator
from pedro.training.cotraining.engine import CotrainingEngine, SharedBackbone
from pedro.training.loop import train
from pedro.training.worker import save_model


class Together:
    """Set-up as of `OurTrainer`, with `jobs`, how many there are."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        quiet()
        self._folder = Path(tempfile.mkdtemp())
        spec, cache = spec_of(setup, setup["method"]), self._folder / "cache"
        training = [spec.training.model_copy(update={"seed": seed}) for seed in range(setup["jobs"])]
        self._specs = [spec.model_copy(update={"training": one}) for one in training]
        self._alone = [build_context(one, cache) for one in self._specs]
        self._backbone = SharedBackbone(spec)
        self._together: dict[int, TrainingContext] = {}
        self._coordinate([partial(self._build, cache)] * len(self._specs))

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """One run of all jobs, `together` or not."""
        shutil.rmtree(self._folder / "run", ignore_errors=True)
        tokens: list[int] = []
        began = time.perf_counter()
        if order["together"]:
            self._coordinate([partial(self._train, tokens)] * len(self._specs))
        else:
            for number, context in enumerate(self._alone):
                self._one(number, context, tokens)
        seconds = time.perf_counter() - began
        assert len(tokens) == len(self._specs), "every job has ended well"
        return {"seconds": seconds, "tok_s": sum(tokens) / seconds}

    def _coordinate(self, works: Sequence[Callable[[Participant], None]]) -> None:
        coordinator = PassCoordinator(self._backbone.stacked_model, works)
        coordinator.run()
        for participant in coordinator.participants:
            if participant.error is not None:
                raise participant.error

    def _build(self, cache: Path, participant: Participant) -> None:
        self._together[participant.number] = self._backbone.context(self._specs[participant.number], cache, participant)

    def _train(self, tokens: list[int], participant: Participant) -> None:
        context = self._together[participant.number]
        assert isinstance(context.engine, CotrainingEngine)
        context.engine.participant = participant
        self._one(participant.number, context, tokens)

    def _one(self, number: int, context: TrainingContext, tokens: list[int]) -> None:
        folder = self._folder / "run" / str(number)
        outcome = train(context.engine, context.alternation, context.plan, context.data, LocalCheckpoints(folder))
        save_model(context, {}, folder / "adapter")
        tokens.append(outcome.all_tokens)
