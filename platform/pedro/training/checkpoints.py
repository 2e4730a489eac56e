"""A run's checkpoint on disk: trained parameters, optimizer state, train state. Without the backbone.

Safetensors and JSON only, written by each worker into its own files of one directory:
`rank<N>.safetensors` (its optimizer's tensors), and by rank 0 `parameters.safetensors`, `best.safetensors`,
`progress.json` and, where the method has a training hook, `companion.safetensors`; beside them `rank<N>.digests.json`,
by which damage is detected. Random numbers and the order of rows are functions of the step, so they are not stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pedro.errors import TrainingError
from pedro.training.engines import StepEngine, optimizer_tensors
from pedro.training.loop import TrainState

if TYPE_CHECKING:
    from pedro.training.worker_group import WorkerGroup

HOOK = "companion.safetensors"  # the hook's state; the name is kept for existing checkpoints
PARAMETERS, BEST, PROGRESS = "parameters.safetensors", "best.safetensors", "progress.json"


class DamagedCheckpoint(TrainingError):
    """The files differ from what was written; an earlier checkpoint may be usable."""


def write_checkpoint(
    directory: Path, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
) -> None:
    """Write this worker's part. Raises TrainingError on every worker if one of them cannot write."""
    with engine.gathered():
        parameters = {name: p.detach().cpu().clone() for name, p in engine.parameters} if group.rank == 0 else {}

    def write() -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            written = []
            if group.rank == 0 or not engine.replicated():
                own = {name: tensor.detach().cpu().clone() for name, tensor in optimizer_tensors(engine)}
                written.append(f"rank{group.rank}.safetensors")
                save_file(own, str(directory / written[-1]))
            if group.rank == 0:
                save_file(parameters, str(directory / PARAMETERS))
                save_file(dict(best), str(directory / BEST))
                progress = {"world": group.world, **state.to_dict()}
                (directory / PROGRESS).write_text(json.dumps(progress))
                written += [PARAMETERS, BEST, PROGRESS]
                if engine.hook is not None:
                    tensors = {name: t.detach().cpu().contiguous() for name, t in engine.hook.state().items()}
                    save_file(tensors, str(directory / HOOK))
                    written.append(HOOK)
            if written:
                digests = {name: _digest(directory / name) for name in written}
                (directory / f"rank{group.rank}.digests.json").write_text(json.dumps(digests))
        except (OSError, SafetensorError) as error:
            raise cannot_write("checkpoint", directory.parent, error) from error

    group.together(write)


@torch.no_grad()
def read_checkpoint(
    directory: Path, engine: StepEngine, group: WorkerGroup
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """Load a checkpoint into the engine. Returns the train state, and on rank 0 the best parameters so far.

    Raises DamagedCheckpoint on every worker, and loads nothing, if a file is missing or differs from what was written.
    A possibly temporary OSError (a stale handle, no permission) says nothing about the files: it is raised unchanged,
    so that loading is retried.
    """
    mine = f"rank{0 if engine.replicated() else group.rank}"

    def read() -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        names = [PARAMETERS, f"{mine}.safetensors"]
        names += ([BEST] if group.rank == 0 else []) + ([HOOK] if engine.hook is not None else [])
        try:
            for rank in {"rank0", mine}:
                _check(directory, rank)
            progress = json.loads((directory / PROGRESS).read_text())
            progress["validations"] = [(int(step), float(loss)) for step, loss in progress["validations"]]
            return progress, {name: load_file(str(directory / name)) for name in names}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise DamagedCheckpoint(f"checkpoint: {directory} cannot be read ({error})", param="checkpoint") from error

    progress, files = group.together(read)
    world = progress.pop("world")
    assert engine.replicated() or world == group.world, (
        f"a checkpoint of {world} workers cannot be resumed with {group.world}"
    )
    with engine.gathered():
        for name, parameter in engine.parameters:
            parameter.data.copy_(files[PARAMETERS][name])
    for name, tensor in optimizer_tensors(engine):
        tensor.data.copy_(files[f"{mine}.safetensors"][name])
    if engine.hook is not None:
        engine.hook.load(files[HOOK])
    return TrainState(**progress), files.get(BEST, {})


def _check(directory: Path, rank: str) -> None:
    """Raise ValueError unless a worker's files are as it wrote them. Earlier releases wrote no digests."""
    path = directory / f"{rank}.digests.json"
    if not path.is_file():
        return
    for name, digest in json.loads(path.read_text()).items():
        if _digest(directory / name) != digest:
            raise ValueError(f"{name} differs from what was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cannot_write(what: str, target: Path | str, error: Exception) -> TrainingError:
    """The error for a full or read-only disk."""
    reason = getattr(error, "strerror", None) or error
    return TrainingError(
        f"{what}: cannot be written to {target} ({reason}); free some space or set PEDRO_STORAGE to another place",
        param="PEDRO_STORAGE",
    )
