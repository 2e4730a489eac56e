"""Checkpoints that are to become versions: they lie in the run's folder until they have, so a killed driver loses none.

Each is a folder with an adapter, and with what is told of it (`CheckpointModels.save`): a checkpoint that the run keeps
to resume from, or, since such ones go when newer ones come, a copy that is removed once it is a version.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedro.stored_files import remove
from pedro.training.storage import fetch_folder, folders, join, put_folder, read_text, write_text

ADAPTER, MADE = "adapter", "made.json"
WAITING = "to_publish"  # in the run's folder; inside, a folder a step


@dataclass(frozen=True)
class WaitingCheckpoint:
    """Where it lies, and what is told of it: its step, the best one, metrics."""

    location: str
    made: Mapping[str, Any]
    copied: bool = True
    """Whether it is there for this alone."""

    @contextmanager
    def here(self) -> Iterator[Path]:
        """Its adapter on this host. Raises UnavailableError if the storage cannot be read."""
        if "://" not in self.location:
            yield Path(self.location) / ADAPTER
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            fetch_folder(join(self.location, ADAPTER), Path(scratch) / ADAPTER)
            yield Path(scratch) / ADAPTER

    def remove(self) -> None:
        """It waits no more."""
        if self.copied:
            remove(self.location)


def keep(run: str, copy_to: Callable[[Any], object], made: Mapping[str, Any]) -> WaitingCheckpoint:
    """Copy a checkpoint's adapter with `copy_to`, which takes a directory, into the run's folder; it waits there."""
    place = join(run, WAITING, f"{made['step']:09}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        copy_to(scratch)
        put_folder(Path(scratch), join(place, ADAPTER))
    write_text(join(place, MADE), json.dumps(dict(made)))  # last: without it nothing is there
    return WaitingCheckpoint(place, made)


def waiting(run: str) -> list[WaitingCheckpoint]:
    """What drivers of the run before this one may have left, by step; some may be versions by now. Raises
    UnavailableError if the storage cannot be read."""
    places = [(join(run, WAITING, name), True) for name in folders(join(run, WAITING))]
    places += [(join(run, name), False) for name in folders(run) if name != WAITING]
    found = []
    for place, copied in places:
        if not place.rpartition("/")[2].startswith(".") and (told := read_text(join(place, MADE))) is not None:
            with suppress(ValueError):  # cut short, on a full disk
                found.append(WaitingCheckpoint(place, json.loads(told), copied))
    return sorted(found, key=lambda one: (one.made["step"], not one.copied))
