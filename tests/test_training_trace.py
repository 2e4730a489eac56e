"""How many files one optimizer step passes through: what a newcomer must open to follow it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
from training_runs import context_for, spec_for

import pedro
from pedro.training.batches import RowStream
from pedro.training.bilevel import OMEGA, THETA
from pedro.training.context import TrainingContext
from pedro.training.loop import batch_step

PACKAGE = f"{Path(pedro.__file__).parent}/"


def _step(context: TrainingContext, role: str) -> None:
    """One step on Ω or Θ, as the loop makes it: rate, roles, rows, forward, backward, optimizer."""
    context.engine.optimizer.set_lr(1e-3, 1e-3)
    context.alternation.activate(role)
    rows = RowStream(context.data.train, context.plan.batch_size, seed=0).batch(0)
    batch_step(context.engine, rows, context.plan, context.data.pad_id, salt=0)


@pytest.mark.parametrize("role", [OMEGA, THETA])
def test_an_optimizer_step_passes_through_four_files_of_training_at_most(tmp_path, role):
    context = context_for(spec_for(tmp_path), tmp_path)
    context.engine.mode(training=True)
    entered: dict[str, str] = {}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and (path := frame.f_code.co_filename).startswith(PACKAGE):
            entered.setdefault(path.removeprefix(PACKAGE), frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        _step(context, role)
    finally:
        sys.setprofile(None)
    trace = "\n".join(f"{file}: {function}" for file, function in entered.items())
    assert {"training/loop.py", "training/engines.py"} <= entered.keys(), trace
    assert sum(file.startswith("training/") for file in entered) <= 4, trace
    assert len(entered) <= 12, trace  # with the method, the kind of adapter that it makes, and the packing of rows
