"""Adapters that a job's driver copies for its workers, who cannot fetch them: the parent and the current champion."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.training.storage import join, put_file

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry import Registry, Version
    from pedro.training.spec import FineTuneSpec

FOLDER = "handed"  # in the run's folder


@dataclass(frozen=True)
class HandedAdapter:
    """One version, and the location of its files for the job's workers."""

    ref: str
    version: int
    folder: str = ""
    files: tuple[str, ...] = ()
    problem: str = ""
    """Why there are no files."""

    @contextmanager
    def here(self) -> Iterator[Path]:
        """Its directory on this host. Raises UnavailableError if the storage cannot be read."""
        if "://" not in self.folder:
            yield Path(self.folder)
            return
        with tempfile.TemporaryDirectory() as scratch:
            for name in self.files:
                put_file(join(self.folder, name), str(Path(scratch) / name))
            yield Path(scratch)


def hand(version: Version, registry: Registry, settings: Settings, job_id: str) -> HandedAdapter:
    """Copy a version to where the job's workers find it. Raises AdapterError and UnavailableError."""
    directory = registry.download(version)
    names = tuple(sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()))
    if settings.storage_in_home:  # on one host
        return HandedAdapter(version.ref, version.version, str(directory), names)
    folder = join(settings.storage, "runs", job_id, FOLDER, directory.name)
    for name in names:
        put_file(str(directory / name), join(folder, name))
    return HandedAdapter(version.ref, version.version, folder, names)


def hand_parent(spec: FineTuneSpec, settings: Settings, job_id: str) -> HandedAdapter | None:
    """`hand` the spec's parent, which must belong to the spec's tenant, whoever started this driver."""
    if not spec.parent:
        return None
    from pedro.registry import Registry

    registry = Registry.open(settings)
    try:
        return hand(registry.store.get_own_version(spec.parent, spec.tenant, "parent"), registry, settings, job_id)
    finally:
        registry.store.close()
