"""A run's checkpoint on disk: what is trained, what the optimizer remembers, where the loop stands. No backbone.

Safetensors and JSON only, written by each worker into its own files of one directory:
`rank<N>.safetensors` (its optimizer's tensors), and by rank 0 `parameters.safetensors`, `best.safetensors`,
`progress.json` and, where the method has a training hook, `companion.safetensors`. Random numbers and the order of rows
are functions of the step, so they need no place here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pedro.errors import TrainingError
from pedro.training.engines import StepEngine, optimizer_tensors
from pedro.training.loop import TrainState

if TYPE_CHECKING:
    from pedro.training.worker_group import WorkerGroup

HOOK = "companion.safetensors"  # the hook's state; the name is that of checkpoints made so far


def write_checkpoint(
    directory: Path, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
) -> None:
    """Write this worker's part. Raises TrainingError on every worker if one of them cannot write."""
    with engine.gathered():
        parameters = {name: p.detach().cpu().clone() for name, p in engine.parameters} if group.rank == 0 else {}

    def write() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if group.rank == 0 or not engine.replicated():
                own = {name: tensor.detach().cpu().clone() for name, tensor in optimizer_tensors(engine)}
                save_file(own, str(directory / f"rank{group.rank}.safetensors"))
            if group.rank == 0:
                save_file(parameters, str(directory / "parameters.safetensors"))
                save_file(dict(best), str(directory / "best.safetensors"))
                if engine.hook is not None:
                    tensors = {name: t.detach().cpu().contiguous() for name, t in engine.hook.state().items()}
                    save_file(tensors, str(directory / HOOK))
                progress = {"world": group.world, **state.to_dict()}
                (directory / "progress.json").write_text(json.dumps(progress))
        except (OSError, SafetensorError) as error:
            raise cannot_write("checkpoint", directory.parent, error) from error

    group.together(write)


@torch.no_grad()
def read_checkpoint(
    directory: Path, engine: StepEngine, group: WorkerGroup
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """Load a checkpoint into the engine; the train state, and on rank 0 the best parameters so far."""
    progress = json.loads((directory / "progress.json").read_text())
    world = progress.pop("world")
    assert engine.replicated() or world == group.world, (
        f"a checkpoint of {world} workers cannot be resumed by {group.world}"
    )
    saved = load_file(str(directory / "parameters.safetensors"))
    with engine.gathered():
        for name, parameter in engine.parameters:
            parameter.data.copy_(saved[name])
    own = load_file(str(directory / f"rank{0 if engine.replicated() else group.rank}.safetensors"))
    for name, tensor in optimizer_tensors(engine):
        tensor.data.copy_(own[name])
    if engine.hook is not None:
        engine.hook.load(load_file(str(directory / HOOK)))
    best = load_file(str(directory / "best.safetensors")) if group.rank == 0 else {}
    progress["validations"] = [(int(step), float(loss)) for step, loss in progress["validations"]]
    return TrainState(**progress), best


def cannot_write(what: str, target: Path | str, error: Exception) -> TrainingError:
    """The error for a disk that is full or read-only."""
    reason = getattr(error, "strerror", None) or error
    return TrainingError(
        f"{what}: cannot be written to {target} ({reason}); free some space or set PEDRO_STORAGE to a place "
        "that has it",
        param="PEDRO_STORAGE",
    )
