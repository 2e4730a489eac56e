"""Which files of a home are in a backup, and where each goes. What is left out can be made again.

Files of these folders never change once their name is there, or are replaced whole, so they may be read beside those
who write; what running jobs write was held before (`running_jobs.py`). Left out are caches, logs of requests, Ray's
files, secrets, and the checkpoints of jobs that have ended.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.backup.archive import REGISTRY
from pedro.backup.running_jobs import belongs_to
from pedro.config import backbones_folder
from pedro.errors import ConfigError
from pedro.refs import NAME
from pedro.registry import Registry

if TYPE_CHECKING:
    from pedro.config import Settings

UNFINISHED = re.compile(r"\.new(-|$)|\.restoring-")  # how names begin that become others
CHECKPOINTS = "runs"  # folder of the storage: one of each job
AGAIN = ("tune", "backbones")  # folders of the storage that are made again: of the sweeps' records, of the home's


@dataclass(frozen=True)
class Places:
    """Where the parts of a backup are on this host, by the first word of their names in the archive."""

    folders: dict[str, Path]
    registry: Path | None
    """MLflow's sqlite file; None for a server."""
    storage: Path | None
    """None where it is no folder of this host."""

    @classmethod
    def of(cls, settings: Settings) -> Places:
        registry = Registry.open(settings).sqlite_file
        storage = None
        if "://" not in settings.storage or settings.storage.startswith("file://"):
            storage = Path(settings.storage.removeprefix("file://"))
            if settings.home.resolve().is_relative_to(storage.resolve()):
                raise ConfigError(
                    f"PEDRO_STORAGE: {storage} holds the home with its secrets, which are in no backup; set it to a "
                    "folder of its own",
                    param="PEDRO_STORAGE",
                )
        folders = {"backbones": backbones_folder(settings.home), "comparisons": settings.home / "comparisons"}
        if registry is not None:
            folders["artifacts"] = Path(settings.artifact_root)
        if storage is not None:
            folders["storage"] = storage
        return cls(folders, registry, storage)

    def target(self, name: str) -> Path:
        """Where a member of an archive belongs."""
        if name == REGISTRY:
            assert self.registry is not None, "a server has no file"
            return self.registry
        part, _, rest = name.partition("/")
        return self.folders[part] / rest


def find_files(
    places: Places, unfinished_jobs: Collection[str], held_runs: Path, *, with_backbones: bool
) -> Iterator[tuple[str, Path]]:
    """The files of the folders as (name in the archive, path), in order; runs that are held are read from there."""
    held = {folder.name for folder in held_runs.iterdir()} if held_runs.is_dir() else set()
    for part, folder in places.folders.items():
        if part == "backbones" and not with_backbones:
            continue
        for path in _walk(folder):
            inside = path.relative_to(folder).parts
            if part == "storage" and not _wanted(inside, unfinished_jobs):
                continue
            if part == "storage" and inside[0] == CHECKPOINTS and len(inside) > 1 and inside[1] in held:
                continue
            if part == "backbones" and not (len(inside) == 2 and NAME.fullmatch(inside[0])):  # locks, unfinished ones
                continue
            yield f"{part}/{'/'.join(inside)}", path
    for path in _walk(held_runs):
        yield f"storage/{CHECKPOINTS}/{'/'.join(path.relative_to(held_runs).parts)}", path


def _wanted(inside: tuple[str, ...], unfinished_jobs: Collection[str]) -> bool:
    """Whether a file of the storage is worth keeping."""
    if inside[0] == CHECKPOINTS:
        return len(inside) == 1 or belongs_to(inside[1], unfinished_jobs)
    return inside[0] not in AGAIN


def _walk(folder: Path) -> Iterator[Path]:
    """Files and links beneath a folder; those of a folder come before those of its folders."""
    for where, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not UNFINISHED.match(name))
        yield from (Path(where, name) for name in sorted(files) if not UNFINISHED.match(name))
        yield from (Path(where, name) for name in names if Path(where, name).is_symlink())  # which are not followed
