"""Stores files for all hosts of a job: the platform's storage is a folder or an fsspec URL.

Data sets are named by their content, so the same file is stored once and never changes during a job.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pedro.data import data_digest
from pedro.data.files import ending
from pedro.errors import PedroError, UnavailableError
from pedro.stored_files import touch

DATASET = re.compile(r"/datasets/[0-9a-f]{64}")
RENEW_S = 1800.0


def put_dataset(file: str, storage: str) -> str:
    """Store a local data file under `datasets/<sha256>` with its extension; returns its location. URLs are unchanged.

    An existing one gets a new modification time, so that `pedro gc` does not consider it unused.

    Raises DataError if it cannot be read, UnavailableError if it cannot be stored.
    """
    if "://" in file:
        return file
    digest = data_digest(file).removeprefix("sha256:")
    suffix, packing = ending(file)
    target = join(storage, "datasets", f"{digest}{suffix or '.jsonl'}{packing}")
    if not _renewed(target):
        _copy(file, target)
    return target


def put_uploaded(source: str, digest: str, suffix: str, storage: str) -> str:
    """Copy an uploaded file to the data sets, where it outlives the file; returns its location.

    `source` is in the storage, and its content has this digest. Raises UnavailableError if it cannot be stored.
    """
    target = join(storage, "datasets", f"{digest.removeprefix('sha256:')}{suffix or '.jsonl'}")
    if not _renewed(target):
        _copy(source, target)
    return target


def fetch(location: str, cache: Path) -> Path:
    """A local path of a stored file: itself, or this host's copy of a URL's current content.

    Cached by URL and by the storage's metadata (size, time or checksum), so that a changed file is fetched again.
    """
    if "://" not in location:
        if DATASET.search(location):  # users' files keep their times
            touch(location)
        return Path(location)
    key = f"{location}\n{_content_key(location)}"
    target = cache / "fetched" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{location.rpartition('/')[2]}"
    if not target.is_file():
        _copy(location, str(target))
    touch(target)
    return target


def _content_key(location: str) -> str:
    """A key of a URL's current content. Data sets are named by their content and never change."""
    if DATASET.search(location):
        return ""
    system, path = _filesystem(location)
    try:
        return str(system.ukey(path))
    except Exception:  # noqa: BLE001 - fsspec raises any type; fetching reports the error
        return ""


def _renewed(target: str) -> bool:
    """Whether a data set exists and is recent; one behind a URL that is older than a day is stored again."""
    if "://" not in target:
        there = Path(target).is_file()
        touch(target)
        return there
    system, path = _filesystem(target)
    with _answering(target):
        try:
            return bool(system.exists(path) and time.time() - system.modified(path).timestamp() < RENEW_S)
        except NotImplementedError:  # it does not report times
            return bool(system.exists(path))


def write_text(location: str, text: str) -> None:
    """Write a small file atomically."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".tmp") as scratch:
        scratch.write(text)
        scratch.flush()
        _copy(scratch.name, location)


def put_file(source: str, target: str) -> None:
    """Store a local file atomically."""
    _copy(source, target)


def read_text(location: str) -> str | None:
    """What `write_text` last wrote; None if there is no such file. Raises UnavailableError if a URL fails."""
    found = read_bytes(location)
    return None if found is None else found.decode()


def read_bytes(location: str) -> bytes | None:
    """A stored file; None if there is no such file. Raises UnavailableError if a URL fails."""
    try:
        if "://" not in location:
            return Path(location).read_bytes()
        system, path = _filesystem(location)
        with _answering(location):
            found: bytes = system.cat_file(path)
        return found
    except FileNotFoundError:
        return None


def folders(location: str) -> list[str]:
    """Names of the folders inside a stored folder, sorted; empty if it does not exist. Raises UnavailableError if a URL
    fails."""
    try:
        if "://" not in location:
            return sorted(path.name for path in Path(location).iterdir() if path.is_dir())
        system, path = _filesystem(location)
        with _answering(location):
            entries = system.ls(path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")


def put_folder(source: Path, target: str) -> None:
    """Store a local folder; in a local storage it appears at once, by a rename, and replaces an existing one. Until
    then it is written beside it, so that a partial copy is deleted with the parent folder.

    Raises UnavailableError if it cannot be stored."""
    if "://" in target:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            _copy(str(path), join(target, path.relative_to(source).as_posix()))
        return
    try:
        place = Path(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=place.parent, ignore_cleanup_errors=True) as new:
            shutil.copytree(source, Path(new) / "made")
            if place.exists():
                place.rename(Path(new) / "old")
            (Path(new) / "made").rename(place)
    except OSError as error:
        raise UnavailableError(f"{target} could not be written ({error.strerror}); free some space") from error


def fetch_folder(location: str, target: Path | str) -> None:
    """Copy a stored folder to a new or existing local one. Raises UnavailableError if a URL fails."""
    if "://" not in location:
        shutil.copytree(location, target, dirs_exist_ok=True)
        return
    system, path = _filesystem(location)
    with _answering(location):
        system.get(path.rstrip("/") + "/", f"{target}/", recursive=True)  # trailing slashes: its contents


def join(storage: str, *parts: str) -> str:
    """A location inside the storage."""
    return "/".join([storage.rstrip("/"), *parts])


def _copy(source: str, target: str) -> None:
    """Copy a file; a local target appears atomically, by a rename."""
    try:
        if "://" in target:
            system, path = _filesystem(target)
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if "://" in source:  # within one storage
                system.cp_file(_filesystem(source)[1], path)
            else:
                system.put_file(source, path)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".new-", dir=Path(target).parent)
        os.close(handle)
        try:
            if "://" in source:
                system, path = _filesystem(source)
                system.get_file(path, scratch)
            else:
                shutil.copyfile(source, scratch)
            Path(scratch).chmod(0o644)
            Path(scratch).replace(target)
        finally:
            Path(scratch).unlink(missing_ok=True)
    except PedroError:
        raise
    except Exception as error:
        field = "data" if "://" in source else "PEDRO_STORAGE"
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
        raise UnavailableError(
            f"{field}: {source} could not be copied to {target} ({reason}); check the location, permissions, keys and "
            "its free space",
            param=field,
        ) from error


@contextmanager
def _answering(location: str) -> Iterator[None]:
    """Turns any error of a storage behind a URL, except missing files and unknown schemes, into UnavailableError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, NotImplementedError):
        raise
    except Exception as error:  # fsspec raises any type: missing credentials are not an OSError
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300] or type(error).__name__
        raise UnavailableError(
            f"PEDRO_STORAGE: {location} could not be read ({reason}); check the location, its permissions and keys",
            param="PEDRO_STORAGE",
        ) from error


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        found: tuple[Any, str] = url_to_fs(url)
        return found
    except (ImportError, ValueError) as error:
        raise UnavailableError(
            f"{url} cannot be used: {error}; install what it names", param="PEDRO_STORAGE"
        ) from error
