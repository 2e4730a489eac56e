"""A run's checkpoint on disk: what is trained, what the optimizer remembers, where the loop stands. No backbone.

Knows nothing of Ray. Safetensors and JSON only, written by each worker into its own files of one directory:
`rank<N>.safetensors` (its optimizer's tensors), and by rank 0 `parameters.safetensors`, `best.safetensors`,
`progress.json` and, where the method has a companion, `companion.safetensors`. Random numbers and the order of rows
are functions of the step, so they need no place here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pedro.errors import TrainingError
from pedro.training.engines import StepEngine, optimizer_tensors
from pedro.training.loop import Progress
from pedro.training.team import Team

COMPANION = "companion.safetensors"


def write_checkpoint(
    directory: Path, engine: StepEngine, team: Team, progress: Progress, best: Mapping[str, torch.Tensor]
) -> None:
    """Write this worker's part. Raises TrainingError on every worker if one of them cannot write."""
    with engine.gathered():
        parameters = {name: p.detach().cpu().clone() for name, p in engine.parameters} if team.rank == 0 else {}

    def write() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if team.rank == 0 or not engine.replicated():
                own = {name: tensor.detach().cpu().clone() for name, tensor in optimizer_tensors(engine)}
                save_file(own, str(directory / f"rank{team.rank}.safetensors"))
            if team.rank == 0:
                save_file(parameters, str(directory / "parameters.safetensors"))
                save_file(dict(best), str(directory / "best.safetensors"))
                if engine.companion is not None:
                    state = {name: t.detach().cpu().contiguous() for name, t in engine.companion.state().items()}
                    save_file(state, str(directory / COMPANION))
                progress_now = {"world": team.world, **progress.to_dict()}
                (directory / "progress.json").write_text(json.dumps(progress_now))
        except (OSError, SafetensorError) as error:
            raise cannot_write("checkpoint", directory.parent, error) from error

    team.together(write)


@torch.no_grad()
def read_checkpoint(directory: Path, engine: StepEngine, team: Team) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Load a checkpoint into the engine; the progress, and on rank 0 the best parameters so far."""
    state = json.loads((directory / "progress.json").read_text())
    world = state.pop("world")
    assert engine.replicated() or world == team.world, f"a checkpoint of {world} workers cannot go on with {team.world}"
    saved = load_file(str(directory / "parameters.safetensors"))
    with engine.gathered():
        for name, parameter in engine.parameters:
            parameter.data.copy_(saved[name])
    own = load_file(str(directory / f"rank{0 if engine.replicated() else team.rank}.safetensors"))
    for name, tensor in optimizer_tensors(engine):
        tensor.data.copy_(own[name])
    if engine.companion is not None:
        engine.companion.load(load_file(str(directory / COMPANION)))
    best = load_file(str(directory / "best.safetensors")) if team.rank == 0 else {}
    state["validations"] = [(int(step), float(loss)) for step, loss in state["validations"]]
    return Progress(**state), best


def cannot_write(what: str, place: Path | str, error: Exception) -> TrainingError:
    """The error for a disk that is full or read-only."""
    reason = getattr(error, "strerror", None) or error
    return TrainingError(
        f"{what}: cannot be written to {place} ({reason}); free some space or set PEDRO_STORAGE to a place that has it",
        param="PEDRO_STORAGE",
    )
