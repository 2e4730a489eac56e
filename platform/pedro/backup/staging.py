"""Files that are restored: unpacked beside where they belong, unseen, and put there all at once or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pedro.backup.archive import REGISTRY, STORE
from pedro.errors import ConfigError, ConflictError
from pedro.registry.snapshot import is_blank

if TYPE_CHECKING:
    from pedro.backup.parts import Places

BESIDE = ("backbones", "comparisons")  # folders that may hold others already


class Staging:
    """Takes the members of an archive; `publish` shows them, `close` removes what was not shown."""

    def __init__(self, places: Places, home: Path) -> None:
        self._places = places
        self._mark = f".restoring-{uuid.uuid4().hex[:8]}"
        self._made: list[Path] = []  # folders, to be removed again
        self._hidden: dict[str, Path] = {}  # by the first word of a member's name
        self._shown: list[tuple[Path, Path]] = []  # where it was hidden, where it is
        self.rows = self._folder(home) / f"{self._mark}-{STORE}"

    def check_empty(self) -> None:
        """Raise ConflictError where files are that would be mixed with those of the backup."""
        if self._places.registry is not None and not is_blank(self._places.registry):
            raise self._occupied(self._places.registry)
        for part, folder in self._places.folders.items():
            if part not in BESIDE and folder.is_dir() and any(folder.iterdir()):
                raise self._occupied(folder)

    @contextmanager
    def sink(self, name: str) -> Iterator[IO[bytes]]:
        """Where a member of an archive is written to. Raises ConfigError for one that has no place by the settings."""
        part, _, rest = name.partition("/")
        if name == STORE:
            path = self.rows
        elif name == REGISTRY and self._places.registry is not None:
            target = self._places.registry
            path = self._hidden[name] = self._folder(target.parent) / f"{self._mark}-{target.name}"
        elif part in self._places.folders:
            path = self._hidden_folder(part) / rest
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            raise ConfigError(f"file: it holds {name}, and its header says that it does not", param="file")
        with os.fdopen(
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if name == STORE else 0o644), "wb"
        ) as s:
            yield s

    def publish(self) -> None:
        """Show all. Raises ConflictError, and shows nothing, where something is in the way."""
        moves = []
        for part, hidden in self._hidden.items():
            if part == REGISTRY:
                moves.append((hidden, self._places.target(part)))
            else:
                moves += [(path, self._places.folders[part] / path.name) for path in sorted(hidden.iterdir())]
        for _, target in moves:
            if target.exists() and target != self._places.registry:
                raise self._occupied(target)
        os.sync()  # what is named is there, after a power cut too
        for hidden, target in moves:
            hidden.replace(target)
            self._shown.append((hidden, target))

    def undo(self) -> None:
        """Hide again what was shown, since what names it could not be entered."""
        for hidden, target in reversed(self._shown):
            target.replace(hidden)
        self._shown.clear()

    def close(self) -> None:
        """Remove what is hidden, and the folders that were made for nothing."""
        self.rows.unlink(missing_ok=True)
        for path in self._hidden.values():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for folder in reversed(self._made):
            with suppress(OSError):  # it holds what was shown
                folder.rmdir()

    def _hidden_folder(self, part: str) -> Path:
        if part not in self._hidden:
            self._hidden[part] = self._folder(self._places.folders[part] / self._mark)
        return self._hidden[part]

    def _folder(self, path: Path) -> Path:
        """Make a folder and those above it, remembering which are new."""
        for folder in reversed((path, *path.parents)):
            if not folder.exists():
                folder.mkdir()
                self._made.append(folder)
        return path

    @staticmethod
    def _occupied(path: Path) -> ConflictError:
        return ConflictError(
            f"{path} already exists, and a backup is only restored into an empty home; set PEDRO_HOME to a new "
            "folder (PEDRO_STORAGE and MLFLOW_TRACKING_URI too where they are set), or move it away",
            param="PEDRO_HOME",
        )
