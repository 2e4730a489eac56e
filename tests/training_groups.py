"""Groups of training workers without Ray: real processes over gloo, each with DeepSpeed unless told otherwise.

One group trains every spec that it is given, since starting its processes costs most.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.multiprocessing
from training_runs import LocalReporter, parameters, run

from pedro.errors import TrainingError
from pedro.methods import packing
from pedro.training.context import build_context, deepspeed_engine, engine_for
from pedro.training.loop import TrainState, train
from pedro.training.spec import FineTuneSpec
from pedro.training.worker_group import WorkerGroup

if TYPE_CHECKING:
    from pedro.training.engines import StepEngine


@dataclass(frozen=True)
class Training:
    """What a group is to train; `cut_at` is the step after whose checkpoint it is broken off once, and resumed.
    `as_job`: with the engine that a job takes. `packed`: the first worker packs, however narrow the backbone, and the
    others pad."""

    name: str
    spec: dict[str, Any]
    cut_at: int | None = None
    as_job: bool = False
    packed: bool = False


Results = dict[str, dict[str, Any]]
"""By the training's name: loss, validations, values, metrics, digest, trainable, rows of the first worker's passes."""


def train_in_group(world: int, folder: Path, trainings: Sequence[Training]) -> Results:
    """Train one after the other with `world` workers."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue: Queue[Results] = context.Queue()
    arguments = (world, port, folder, trainings, queue)
    workers = [context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for worker in workers:
        worker.start()
    try:
        results = None
        while results is None:
            with suppress(Empty):
                results = queue.get(timeout=1)
            codes = [worker.exitcode for worker in workers]
            assert results is not None or not any(codes), f"workers ended with exit codes {codes}"
        for worker in workers:
            worker.join(30)
        return results
    finally:
        for worker in workers:
            worker.kill()


def _worker(
    rank: int, world: int, port: int, folder: Path, trainings: Sequence[Training], queue: Queue[Results]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = WorkerGroup(rank, world)
    with pytest.raises(TrainingError, match="the last worker cannot"):  # on every worker, so that none waits for it
        group.together(lambda: _fail_if(rank == world - 1))
    results = {training.name: _train(training, folder, group) for training in trainings}
    if rank == 0:
        queue.put(results)
    torch.distributed.barrier()


def _fail_if(failing: bool) -> None:
    if failing:
        raise TrainingError("the last worker cannot")


def _train(training: Training, folder: Path, group: WorkerGroup) -> dict[str, Any]:
    from pedro.training.worker import Trained, evaluate, save

    spec = FineTuneSpec.model_validate(training.spec)
    make_engine = engine_for if training.as_job else deepspeed_engine
    if training.cut_at:
        first = build_context(spec, folder / "cache", make_engine(spec), group)
        cut = _Cut(folder / training.name, training.cut_at)
        with pytest.raises(InterruptedError):
            train(first.engine, first.alternation, first.plan, first.data, cut)
    with pytest.MonkeyPatch.context() as patched:
        if training.packed:
            patched.setattr(packing, "WIDTH", 0)
            patched.setattr(packing, "SAVED", 2.0 if group.rank else 0.0)
        context = build_context(spec, folder / "cache", make_engine(spec), group)
        rows: set[int] = set()
        embedding: Any = context.model.get_input_embeddings()  # type: ignore[operator]
        handle = embedding.register_forward_hook(lambda _module, given, _output: rows.add(len(given[0])))
        outcome = run(context, folder / training.name)
        handle.remove()
    metrics, _, _ = evaluate(context, group)
    digest = save(context, Trained(outcome, metrics), folder / f"{training.name}-adapter")
    with context.engine.gathered():
        values = parameters(context)
    return {
        "loss": outcome.validation_loss,
        "validations": outcome.validations,
        "values": {key: value.tolist() for key, value in values.items()},
        "metrics": metrics,
        "digest": digest,
        "trainable": context.trainable_parameters,
        "tokens": outcome.all_tokens,
        "rows": rows,
    }


class _Cut(LocalReporter):
    """A reporter that breaks the run off after the checkpoint of a step."""

    def __init__(self, directory: Path, step: int) -> None:
        super().__init__(directory, lambda _line: None)
        self.step = step

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        super().checkpoint(engine, group, state, best)
        if state.step == self.step:
            raise InterruptedError
