"""Keeps what a job's driver prints in the storage, where it outlives the cluster: `jobs/<id>/log.txt`.

Python's own lines only (workers' included, which Ray prints through it), not those of Ray's C++ parts. A folder gets
every line as it comes; a storage behind a URL gets the file again every few seconds, and at the end.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pedro.errors import NotFoundError, PedroError
from pedro.training.storage import join, put_file, read_text

UPLOAD_S = 10.0
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")


def kept_log(storage: str, job_id: str) -> str | None:
    """What a job has printed so far, None if nothing was kept. Raises NotFoundError for what is no job's id."""
    if not JOB_ID.fullmatch(job_id):
        raise NotFoundError(f"job {job_id!r} does not exist; `pedro jobs list` shows their ids", param="job")
    return read_text(join(storage, "jobs", job_id, "log.txt"))


@contextlib.contextmanager
def keeping_log(storage: str, job_id: str) -> Iterator[None]:
    """Copy standard output and error into the storage while the block runs; a log that cannot be kept is said once."""
    target = join(storage, "jobs", job_id, "log.txt")
    with contextlib.ExitStack() as stack:
        try:
            path = Path(target)
            if "://" in target:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            if "://" in target and (before := read_text(target)):  # of a driver before this one
                path.write_text(before, encoding="utf-8")
            file = stack.enter_context(path.open("a", encoding="utf-8", errors="replace", buffering=1))
        except (OSError, PedroError) as error:
            print(f"the job's log is not kept: {error}", file=sys.stderr, flush=True)
            yield
            return
        log = _Log(file)
        if "://" in target:
            stack.enter_context(_uploading(path, target))
        with contextlib.redirect_stdout(_Both(sys.stdout, log)), contextlib.redirect_stderr(_Both(sys.stderr, log)):
            yield


class _Log:
    """A file that both streams write, from any thread, until it can no longer be written."""

    def __init__(self, file: IO[str]) -> None:
        self._file: IO[str] | None = file
        self._lock = threading.Lock()

    def write(self, text: str) -> None:
        with self._lock:
            try:
                if self._file:
                    self._file.write(text)
            except (OSError, ValueError) as error:  # a full disk must not end the job
                self._file = None
                print(f"the job's log is kept no longer: {error}", file=sys.__stderr__, flush=True)


class _Both:
    """A stream that copies what is written to it."""

    def __init__(self, stream: IO[str], log: _Log) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _uploading(path: Path, target: str) -> Iterator[None]:
    over = threading.Event()
    thread = threading.Thread(target=_upload, args=(path, target, over), name="job-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)


def _upload(path: Path, target: str, over: threading.Event) -> None:
    sent, last = 0, False
    while not last:
        last = over.wait(UPLOAD_S)
        size = path.stat().st_size
        if size == sent:
            continue
        try:
            put_file(str(path), target)
            sent = size
        except (OSError, PedroError) as error:  # the next round, or what stands there already, has to do
            print(f"the job's log was not stored: {error}", file=sys.__stderr__, flush=True)
