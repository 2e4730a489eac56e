"""The checkpoints that Ray Train kept of a run: newest first, and its list of them made anew where it is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from ray.train import Checkpoint, RunConfig

PREFIX = "checkpoint_"  # of the names of Ray Train's folders, which continue with the time


def newest_first() -> Iterator[Checkpoint]:
    """The run's last checkpoint, then earlier ones that still exist."""
    import ray.train

    last = ray.train.get_checkpoint()
    if last is None:
        return
    yield last
    run, _, name = last.path.rstrip("/").rpartition("/")
    for other in reversed(_folders(last.filesystem, run)):
        if other < name:  # later ones were never reported: they are incomplete
            yield ray.train.Checkpoint(f"{run}/{other}", last.filesystem)


def mend_list(run_config: RunConfig) -> bool:
    """Make Ray Train's list of a run's checkpoints anew from their folders, if it cannot be used. Returns whether so.

    Ray writes the list over the one before: whoever is killed in the middle leaves a part, which Ray refuses ever
    after, as it does a list that names a checkpoint that is gone. A checkpoint that was not written whole may then be
    the last one; workers find that, and resume from the one before it.
    """
    from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager as rays

    config: Any = run_config  # of version 2 of Ray Train
    storage = config.storage_context
    try:
        rays.CheckpointManager(config.checkpoint_config, storage)
    except CheckpointManagerInitializationError:
        pass
    else:
        return False
    files = storage.storage_filesystem
    kept = [
        rays._TrainingResultState(checkpoint_dir_name=name, metrics={})
        for name in _folders(files, storage.experiment_fs_path)
    ]
    anew = rays._CheckpointManagerState(
        checkpoint_results=kept,
        checkpoint_report_indices=list(range(len(kept))),
        latest_checkpoint_result=kept[-1] if kept else None,
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(kept),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    with files.open_output_stream(storage.checkpoint_manager_snapshot_path) as file:
        file.write(anew.model_dump_json().encode())
    return True


def _folders(files: FileSystem, run: str) -> list[str]:
    """Names of the checkpoints in a run's folder, oldest first."""
    from pyarrow.fs import FileSelector, FileType

    entries = files.get_file_info(FileSelector(run, allow_not_found=True))
    folders = (entry.base_name for entry in entries if entry.type == FileType.Directory)
    return sorted(name for name in folders if name.startswith(PREFIX))
