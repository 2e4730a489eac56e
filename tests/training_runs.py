"""Tiny real runs for the tests of the training room: the packaged backbone, a few dozen rows, a few steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pedro.training.checkpoints import read_checkpoint, write_checkpoint
from pedro.training.context import TrainingContext, build_context
from pedro.training.loop import TrainingOutcome, TrainState, train
from pedro.training.spec import FineTuneSpec
from pedro.training.sweep.spec import SweepSpec

if TYPE_CHECKING:
    from pedro.training.engines import StepEngine
    from pedro.training.worker_group import WorkerGroup

COLOURS = ("red", "blue", "green")
BETA = 0.5
WIDTHS = {"method.r": {"grid": [2, 3, 6]}}


def write_rows(path: Path, count: int = 72, start: int = 0) -> Path:
    """Distinct prompts with answers of unequal length."""
    rows = [
        {"prompt": f"item {i} shade {i % 3}:", "completion": " and ".join([COLOURS[i % 3]] * (1 + i % 4))}
        for i in range(start, start + count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def spec_for(
    folder: Path, method: str | dict[str, Any] = "pedro", resources: dict[str, Any] | None = None, **training: Any
) -> FineTuneSpec:
    """A spec on freshly written rows; `training` overrides the small defaults."""
    train_file = folder / "train.jsonl"
    if not train_file.exists():
        write_rows(train_file)
    settings = {"max_steps": 6, "epochs": 100, "batch_size": 8, "lr": 1e-2, "eval_every": 3, "max_length": 64}
    return FineTuneSpec.model_validate(
        {
            "tenant": "acme",
            "adapter": "colours",
            "data": {"train": str(train_file), "theta": 0.2, "validation": 0.2},
            "method": {"name": method} if isinstance(method, str) else method,
            "training": {**settings, **training},
            "resources": resources or {},
        }
    )


def sweep_for(folder: Path, space: Mapping[str, Any] | None = None, **changes: Any) -> SweepSpec:
    """A sweep of `spec_for`, over WIDTHS unless another space is given; `training` changes its job."""
    base = spec_for(folder, **changes.pop("training", {})).to_dict()
    base["method"] = changes.pop("method", {"name": "pedro"})
    return SweepSpec.model_validate({"name": "widths", "base": base, "space": space or WIDTHS, **changes})


def write_pairs(path: Path, count: int = 48) -> Path:
    """Preferences: the better answer names the shade of its prompt. Both sides have answers of unequal length."""
    rows = [
        {
            "prompt": f"item {i} shade {i % 3}:",
            "chosen": " and ".join([COLOURS[i % 3]] * (1 + i % 3)),
            "rejected": " and ".join([COLOURS[(i + 1) % 3]] * (1 + i % 2)),
        }
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def dpo_spec_for(
    folder: Path, method: str | dict[str, Any] = "pedro", resources: dict[str, Any] | None = None, **training: Any
) -> FineTuneSpec:
    """As `spec_for`, on preferences and with β = BETA."""
    fields = spec_for(folder, method, resources, **training).to_dict()
    fields["data"]["train"] = str(write_pairs(folder / "pairs.jsonl"))
    return FineTuneSpec.model_validate({**fields, "gate": {}, "objective": "dpo", "dpo": {"beta": BETA}})


def context_for(spec: FineTuneSpec, folder: Path) -> TrainingContext:
    """One worker's context on plain torch."""
    torch.set_num_threads(1)
    return build_context(spec, folder / "cache")


class LocalReporter:
    """Checkpoints in a folder of this host, lines to `log`."""

    def __init__(self, directory: Path, log: Callable[[str], None] = print) -> None:
        self.directory, self.log = directory, log

    def resume(self, engine: StepEngine, group: WorkerGroup) -> tuple[TrainState, Mapping[str, torch.Tensor]] | None:
        last = self.directory / "last"
        return read_checkpoint(last, engine, group) if last.is_dir() else None

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        making, last = self.directory / "making", self.directory / "last"
        write_checkpoint(making, engine, group, state, best)
        if group.rank == 0:
            shutil.rmtree(last, ignore_errors=True)
            making.rename(last)
        group.gather(None)  # nobody writes into `making` before it has been moved

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nobody reads them."""

    def line(self, text: str) -> None:
        self.log(text)


class Interrupted(Exception):
    """Stands for a worker that is killed."""


class DiesAfterCheckpoint(LocalReporter):
    """A worker that is gone as soon as the checkpoint of `step` is on disk."""

    def __init__(self, directory: Path, step: int) -> None:
        super().__init__(directory, log=lambda _line: None)
        self.step = step

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        super().checkpoint(engine, group, state, best)
        if state.step == self.step:
            raise Interrupted


def run(context: TrainingContext, folder: Path) -> TrainingOutcome:
    """Train to the end, or resume from the checkpoint in `folder`."""
    reporter = LocalReporter(folder, log=lambda _line: None)
    return train(context.engine, context.alternation, context.plan, context.data, reporter)


def parameters(context: TrainingContext) -> dict[str, torch.Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in context.engine.parameters}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
