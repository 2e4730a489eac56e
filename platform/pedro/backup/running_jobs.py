"""Holds the checkpoints of jobs that run while a backup is made: each run as of one moment.

Ray Train writes a checkpoint, then the record that names it, then removes the one that is too old. A job that is
resumed from a record whose checkpoints are not all there fails. So the record is read first, its checkpoints are linked
or copied, and the record must still name them afterwards: then none of them was being removed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from pedro.errors import UnavailableError

RECORD = "checkpoint_manager_snapshot.json"
TRIES, PAUSE_S = 50, 0.1


def belongs_to(folder: str, jobs: Collection[str]) -> bool:
    """Whether a run's folder is that of one of these jobs, or of a trial of a sweep among them."""
    return any(folder == job or folder.startswith(f"{job}-trial-") for job in jobs)


def hold_runs(runs: Path, jobs: Collection[str], into: Path) -> None:
    """Put into a folder what these jobs' runs would be resumed from; runs without a record have nothing.

    Raises UnavailableError where a run cannot be had as of one moment.
    """
    try:
        folders = sorted(runs.iterdir())
    except FileNotFoundError:
        return
    for folder in folders:
        if belongs_to(folder.name, jobs) and (folder / RECORD).is_file():
            _hold(folder, into / folder.name)


def _hold(folder: Path, into: Path) -> None:
    for _ in range(TRIES):
        names = _named(folder)
        if names is not None and _copied(folder, names, into) and names <= (_named(folder) or set()):
            return
        shutil.rmtree(into, ignore_errors=True)
        if not folder.exists():  # its job ended and was forgotten
            return
        time.sleep(PAUSE_S)
    raise UnavailableError(
        f"the checkpoints of {folder.name} change faster than they can be read; run the same command again, or pause "
        f"the job first (`pedro jobs pause {folder.name}`); nothing of the backup was kept"
    )


def _named(folder: Path) -> set[str] | None:
    """The checkpoints that a run's record names; None while it is being written."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        return {str(one["checkpoint_dir_name"]) for one in record["checkpoint_results"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _copied(folder: Path, names: Collection[str], into: Path) -> bool:
    """Copy the checkpoints and the record; False where something went away meanwhile."""
    try:
        into.mkdir(parents=True)
        record = (folder / RECORD).read_bytes()
        for name in names:
            shutil.copytree(folder / name, into / name, copy_function=_link)
        (into / RECORD).write_bytes(record)
    except (FileNotFoundError, shutil.Error):
        return False
    return _named(into) == set(names)


def _link(source: str, target: str) -> None:
    """A second name of a file where the disk has it, else a copy: files of checkpoints do not change."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
