"""What is in a folder or under an fsspec URL: its parts with their size and age, and how one is removed for good.

What the files mean is up to the caller. A part is as old as the newest file in it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pedro.errors import UnavailableError

GONE = ".gone-"  # what is being removed: renamed first, so that nobody finds half of it
_MOMENTS = ("mtime", "LastModified", "last_modified", "updated", "created")  # as fsspec's systems call it


@dataclass(frozen=True)
class StoredPart:
    """A file or a folder with all that is in it."""

    name: str
    location: str
    bytes: int
    modified: float
    """When something in it was last written; now, where that cannot be known."""


def parts(location: str) -> list[StoredPart]:
    """What a folder holds, by name; nothing where it is not there. Raises UnavailableError for a URL that fails."""
    if "://" in location:
        return _parts_behind(location)
    try:
        with os.scandir(location) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []
    measured = ((entry, _measure(entry.path)) for entry in entries)
    return [StoredPart(entry.name, entry.path, *size) for entry, size in measured if size is not None]


def part(location: str) -> StoredPart | None:
    """One file or folder; None if it is not there."""
    folder, _, name = location.rstrip("/").rpartition("/")
    if "://" not in location:
        size = _measure(location)
        return None if size is None else StoredPart(name, location, *size)
    return next((found for found in parts(folder) if found.name == name), None)


def total_bytes(location: str) -> int:
    """Of everything in a folder, or of one file; 0 where there is none."""
    if "://" in location:
        return sum(found.bytes for found in parts(location))
    size = _measure(location)
    return 0 if size is None else size[0]


def remove(location: str) -> None:
    """Remove a file or a folder for good; one that is gone already is no error.

    A folder of this host vanishes at once, by a rename. Raises UnavailableError where that is not allowed.
    """
    try:
        if "://" in location:
            system, path = _system(location)
            if system.exists(path):
                system.rm(path, recursive=True)
            return
        place = Path(location)
        if place.is_dir() and not place.is_symlink():
            if not place.name.startswith(GONE):
                place = place.rename(place.with_name(f"{GONE}{secrets.token_hex(8)}"))
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink()
    except FileNotFoundError:
        return
    except UnavailableError:
        raise
    except Exception as error:  # fsspec's systems raise any type
        raise _failed(location, "removed", error) from error


def touch(location: str | Path) -> None:
    """Say that something of this host is in use now; what may not be written stays as it is."""
    try:
        os.utime(location)
    except OSError:
        return


def _measure(path: str) -> tuple[int, float] | None:
    """Bytes and newest moment of a file or of all below a folder; None where there is nothing. Follows no link."""
    try:
        own = os.lstat(path)
    except OSError:
        return None
    size, newest = own.st_size, own.st_mtime
    if os.path.isdir(path) and not os.path.islink(path):
        size = 0
        for stat in _below(path):
            size, newest = size + stat.st_size, max(newest, stat.st_mtime)
    return size, newest


def _below(folder: str) -> Iterator[os.stat_result]:
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(place, name))
            except OSError:  # gone meanwhile
                continue


def _parts_behind(location: str) -> list[StoredPart]:
    try:
        system, root = _system(location)
        if not system.exists(root):
            return []
        found: dict[str, Any] = system.find(root, detail=True)
    except FileNotFoundError:
        return []
    except UnavailableError:
        raise
    except Exception as error:
        raise _failed(location, "listed", error) from error
    grouped: dict[str, list[Any]] = defaultdict(list)
    prefix = f"{root.strip('/')}/"
    for path, facts in found.items():
        grouped[path.strip("/").removeprefix(prefix).partition("/")[0]].append(facts)
    base = location.rstrip("/")
    return [
        StoredPart(name, f"{base}/{name}", sum(int(facts.get("size") or 0) for facts in files), _newest(files))
        for name, files in sorted(grouped.items())
    ]


def _newest(files: Iterable[Any]) -> float:
    return max((_moment(facts) for facts in files), default=0.0)


def _moment(facts: Any) -> float:
    value = next((facts[name] for name in _MOMENTS if facts.get(name)), None)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return time.time()
    if isinstance(value, datetime):
        return value.timestamp()
    return float(value) if isinstance(value, (int, float)) else time.time()


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        found: tuple[Any, str] = url_to_fs(url)
        return found
    except (ImportError, ValueError) as error:
        raise UnavailableError(f"{url} cannot be used: {error}; install what it names") from error


def _failed(location: str, what: str, error: Exception) -> UnavailableError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300] or type(error).__name__
    return UnavailableError(f"{location} could not be {what} ({reason}); check its permissions and keys, and try again")
