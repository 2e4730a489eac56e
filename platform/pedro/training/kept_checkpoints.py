"""The checkpoints that Ray Train kept of a run, newest first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.train import Checkpoint


def newest_first() -> Iterator[Checkpoint]:
    """The run's last checkpoint, then earlier ones that still exist."""
    import ray.train
    from pyarrow.fs import FileSelector

    last = ray.train.get_checkpoint()
    if last is None:
        return
    yield last
    run, _, name = last.path.rstrip("/").rpartition("/")
    entries = last.filesystem.get_file_info(FileSelector(run, allow_not_found=True))
    earlier = sorted((e.base_name for e in entries if e.base_name.startswith("checkpoint_")), reverse=True)
    for other in earlier:
        if other < name:  # later ones were never reported: they are incomplete
            yield ray.train.Checkpoint(f"{run}/{other}", last.filesystem)
