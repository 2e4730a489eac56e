"""The backbones that a home keeps: each written whole or not at all, by one process at a time, its origin beside it.

Where they come from (wheels, the hub, GGUF files) is left to other modules.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pedro.backbone import embedded_backbones
from pedro.backbone_files import read_json
from pedro.config import backbones_folder
from pedro.errors import BackboneError, ConfigError, ConflictError, NotFoundError, UnavailableError
from pedro.refs import NAME

ORIGIN = "pedro_backbone.json"
VERSIONS = ("pedro-platform", "torch", "transformers", "tokenizers", "safetensors", "gguf")
Log = Callable[[str], None]


@dataclass(frozen=True)
class Origin:
    """Where a kept backbone comes from, as `pedro_backbone.json` has it."""

    source: str
    """What was pulled or added: a recipe's name, a hub id, or a path."""
    kind: str
    """recipe, hub, directory or gguf."""
    file: str | None = None
    """The file that the weights were made of; None where the directory was copied."""
    sha256: str | None = None
    """Of that file."""
    licence: str | None = None
    revision: str | None = None
    """The commit on the hub, or the package and version of a recipe."""
    quantisation: str | None = None
    """The types of a GGUF file's tensors, before they became bfloat16."""
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def stamped(origin: Origin) -> dict[str, Any]:
    """The origin as it is written: with the time and the versions that made the backbone."""
    found = {name: _version(name) for name in VERSIONS}
    made = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: version for name, version in found.items() if version},
    }
    return {**asdict(origin), **made}


def read_origin(directory: Path) -> Origin | None:
    """The origin of a kept backbone; None where there is none to read, as for a packaged one."""
    try:
        found = read_json(directory / ORIGIN, directory.name)
        return Origin(**{name: found[name] for name in Origin.__dataclass_fields__ if name in found}) if found else None
    except (BackboneError, TypeError):
        return None


def check_backbone_name(name: str) -> str:
    """`name` if a kept backbone may have it. Raises ConfigError for another, ConflictError for a packaged one's."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"name: {name!r} is not a valid name of a backbone; use 1 to 63 of a-z, 0-9, '_' and '-', a letter or "
            "digit first (--name gives another)",
            param="name",
        )
    if name.casefold() in (packaged.casefold() for packaged in embedded_backbones()):
        raise ConflictError(
            f"name: {name!r} is the name of a packaged backbone; give another with --name", param="name"
        )
    return name


def name_from(text: str) -> str:
    """A name made of a file's or a repository's: `SmolLM2-1.7B.Q4_1` is `smollm2-1-7b-q4_1`."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-_")[:63].strip("-_")


def find_kept(home: Path, name: str) -> Path | None:
    """The directory of a kept backbone; None if the home keeps none of that name."""
    directory = backbones_folder(home) / name
    return directory if NAME.fullmatch(name) and (directory / "config.json").is_file() else None


@contextmanager
def locked(home: Path, name: str, log: Log) -> Iterator[None]:
    """Nobody else makes or removes this backbone meanwhile; waits for whoever does."""
    from filelock import FileLock, Timeout

    folder = backbones_folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(f"another process is making or removing {name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def made_whole(home: Path, name: str) -> Iterator[Path]:
    """An empty folder that becomes the backbone when the block ends well, and is gone when it does not.

    For who holds the lock. What a process that was killed left behind goes first. Raises UnavailableError where the
    disk does not take it.
    """
    folder = backbones_folder(home)
    for left in folder.glob(f".{name}.new-*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.new-", dir=folder))
    try:
        yield scratch
        for path in scratch.iterdir():
            path.chmod(0o644)
            _sync(path)
        scratch.chmod(0o755)
        _sync(scratch)
        scratch.rename(folder / name)
        _sync(folder)
    except OSError as error:
        raise UnavailableError(
            f"backbone: {name} could not be written to {folder} ({error.strerror or error}); check its free space and "
            "its rights; nothing was kept",
            param="backbone",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_origin(directory: Path, origin: Origin) -> None:
    """Write the origin beside the weights. It is no part of the digest."""
    (directory / ORIGIN).write_text(json.dumps(stamped(origin), indent=2) + "\n", encoding="utf-8")


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise UnavailableError where the disk of `folder` lacks `needed` bytes."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UnavailableError(
            f"backbone: {what} takes {needed / 1e6:,.0f} MB on the disk of {there}, which has {free / 1e6:,.0f} MB "
            "free; free some, or set PEDRO_HOME to a folder on another disk",
            param="backbone",
        )


def check_removable(home: Path, name: str) -> Path:
    """The directory of a kept backbone. Raises NotFoundError if there is none, ConflictError for a packaged one."""
    if name in embedded_backbones():
        raise ConflictError(f"name: {name!r} is packaged with pedro and stays", param="name")
    directory = find_kept(home, name)
    if directory is None:
        raise NotFoundError(
            f"name: {name!r} is not a backbone that {backbones_folder(home)} keeps; `pedro backbones list` shows them",
            param="name",
        )
    return directory


def remove_kept(home: Path, name: str, log: Log) -> None:
    """Remove a kept backbone as one step. Raises as `check_removable` does."""
    check_removable(home, name)
    with locked(home, name, log):
        gone = Path(tempfile.mkdtemp(prefix=f".{name}.new-", dir=backbones_folder(home)))
        (backbones_folder(home) / name).rename(gone / name)
        shutil.rmtree(gone, ignore_errors=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _sync(path: Path) -> None:
    """Have the disk hold what was written, so that a rename never shows what a power cut takes back."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
