"""The bytes of uploaded files in the platform's storage, a folder or an fsspec URL.

A file grows under a name of its own among the scratch files and gets its place by a rename once it is whole. Each
tenant has a folder, and a place there is the file's id: equal contents of two tenants lie twice, so that nobody learns
what another one has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO, cast

from pedro.config import UPLOADS
from pedro.errors import UnavailableError

SCRATCH = ".new"
MOMENTS = ("mtime", "LastModified", "updated", "created")  # as fsspec's systems call the time of writing
log = logging.getLogger("pedro.files")


class Contents:
    """Writes, reads and removes. Places are relative to the storage, so that they stay true where it is moved."""

    def __init__(self, storage: str) -> None:
        from fsspec.core import url_to_fs

        self._storage = storage.rstrip("/")
        with _reported("opened"):
            self._system, root = url_to_fs(storage)
        self._root = root.rstrip("/")

    def url(self, place: str) -> str:
        """A place as other rooms name it: a path, or a URL."""
        return f"{self._storage}/{place}"

    def begin(self) -> Scratch:
        """A new file, empty and without a place."""
        folder = f"{self._root}/{UPLOADS}/{SCRATCH}"
        with _reported("written"):
            self._system.makedirs(folder, exist_ok=True)
            return Scratch(self._system, f"{folder}/{uuid.uuid4().hex}")

    def keep(self, scratch: Scratch, place: str) -> None:
        """Give a whole file its place."""
        path = f"{self._root}/{place}"
        with _reported("written"):
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            scratch.move(path)

    def open(self, place: str) -> BinaryIO:
        """Raises UnavailableError where it cannot be read, or is not there."""
        with _reported("read"):
            return cast("BinaryIO", self._system.open(f"{self._root}/{place}", "rb"))

    def remove(self, place: str) -> None:
        """Remove what is there, if anything is. Raises UnavailableError where it stays."""
        with _reported("removed"), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{place}")

    def sweep(self, older_than_s: float) -> int:
        """Remove what processes that ended midway left behind; how many. Younger ones may still be growing."""
        removed = 0
        with _reported("swept"):
            try:
                entries = self._system.ls(f"{self._root}/{UPLOADS}/{SCRATCH}", detail=True)
            except FileNotFoundError:
                return 0
            for entry in entries:
                if entry["type"] == "file" and _age_s(entry) > older_than_s:
                    with contextlib.suppress(FileNotFoundError):  # another gateway was faster
                        self._system.rm_file(entry["name"])
                        removed += 1
        return removed


class Scratch:
    """A file that grows. Of threads that write and abandon it at once, none leaves it behind."""

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self._lock = threading.Lock()
        self._ended = False
        self._file = system.open(path, "wb")

    def write(self, data: bytes) -> None:
        """Append. Raises UnavailableError."""
        with self._lock, _reported("written"):
            assert not self._ended, "a file that has ended does not grow"
            self._file.write(data)

    def move(self, path: str) -> None:
        """End it, whole, and have it there."""
        with self._lock:
            assert not self._ended, "a file ends once"
            self._file.flush()
            with contextlib.suppress(AttributeError, OSError):  # where it is a file of this host
                os.fsync(self._file.fileno())
            self._file.close()
            self._system.mv(self._path, path)
            self._ended = True

    def abandon(self) -> None:
        """Remove it, unless it has ended."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            with contextlib.suppress(Exception):  # a full disk fails here once more
                self._file.close()
            try:
                if self._system.exists(self._path):
                    self._system.rm_file(self._path)
            except Exception:  # fsspec's systems raise any type
                log.exception("a scratch file was left behind, which the next start removes")


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn what a storage raises, which may be anything, into an error that tells a tenant nothing of the host."""
    try:
        yield
    except (UnavailableError, AssertionError):
        raise
    except Exception as error:
        log.exception("a file could not be %s in the storage", what)
        raise UnavailableError(
            f"The file could not be {what}: the platform's storage is full or does not answer; try again later.",
            code="storage",
        ) from error


def _age_s(entry: dict[str, Any]) -> float:
    """Seconds since a file was written; 0 where its system does not tell."""
    stamp = next((entry[name] for name in MOMENTS if entry.get(name) is not None), None)
    if isinstance(stamp, datetime):
        stamp = stamp.timestamp()
    return time.time() - stamp if isinstance(stamp, int | float) else 0.0
