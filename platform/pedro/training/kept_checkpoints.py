"""The checkpoints that Ray Train kept of a run, from the last one back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.train import Checkpoint


def newest_first() -> Iterator[Checkpoint]:
    """The run's last checkpoint, then those before it that are still there."""
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
        if other < name:  # a later one was never told of: it is not whole
            yield ray.train.Checkpoint(f"{run}/{other}", last.filesystem)
