"""Copies the output of a job's driver to the storage, where it outlives the cluster: `jobs/<id>/log.txt`.

Only lines from Python (including those of workers, which Ray prints through it), not from Ray's C++ code. In a folder,
lines are appended at once; a storage behind a URL gets the whole file every few seconds, and at the end.
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
LOGS = threading.local()
"""The log of the job that this thread drives, if it has its own."""
JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")


def kept_log(storage: str, job_id: str) -> str | None:
    """A job's output so far, None if there is no log. Raises NotFoundError for an invalid id."""
    if not JOB_ID.fullmatch(job_id):
        raise NotFoundError(f"job {job_id!r} does not exist; `pedro jobs list` shows their ids", param="job")
    return read_text(join(storage, "jobs", job_id, "log.txt"))


@contextlib.contextmanager
def keeping_log(storage: str, job_id: str) -> Iterator[None]:
    """Copy standard output and error to the storage while the block runs; if that fails, this is reported once."""
    with _opened(storage, job_id) as log:
        if log is None:
            yield
            return
        with contextlib.redirect_stdout(_Both(sys.stdout, log)), contextlib.redirect_stderr(_Both(sys.stderr, log)):
            yield


@contextlib.contextmanager
def keeping_log_of_thread(storage: str, job_id: str) -> Iterator[None]:
    """The same for this thread's output, which then goes nowhere else, since other threads' jobs may be other tenants'.
    Within `by_thread`."""
    with _opened(storage, job_id) as log:
        LOGS.log = log
        try:
            yield
        finally:
            LOGS.log = None


@contextlib.contextmanager
def by_thread() -> Iterator[None]:
    """Within this context, a thread's output goes to its own log, if it has one."""
    with contextlib.redirect_stdout(_OfThread(sys.stdout)), contextlib.redirect_stderr(_OfThread(sys.stderr)):
        yield


@contextlib.contextmanager
def _opened(storage: str, job_id: str) -> Iterator[_Log | None]:
    """A job's log, opened for appending; None if that fails."""
    target = join(storage, "jobs", job_id, "log.txt")
    with contextlib.ExitStack() as stack:
        try:
            path = Path(target)
            if "://" in target:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "log.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            if "://" in target and (before := read_text(target)):  # written by an earlier driver
                path.write_text(before, encoding="utf-8")
            file = stack.enter_context(path.open("a", encoding="utf-8", errors="replace", buffering=1))
        except (OSError, PedroError) as error:
            print(f"the job's log cannot be stored: {error}", file=sys.stderr, flush=True)
            yield None
            return
        log = _Log(file)
        if "://" in target:
            stack.enter_context(_uploading(path, target))
        yield log


class _Log:
    """A file that both streams write, from any thread, until writing fails."""

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
                print(f"the job's log can no longer be stored: {error}", file=sys.__stderr__, flush=True)


class _Both:
    """A stream that also copies its output to a log."""

    def __init__(self, stream: IO[str], log: _Log) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _OfThread:
    """A stream that redirects the output of threads with their own log to that log."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        log: _Log | None = getattr(LOGS, "log", None)
        if log is None:
            return self._stream.write(text)
        log.write(text)
        return len(text)

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
        except (OSError, PedroError) as error:  # the next upload, or the last one, must do
            print(f"the job's log could not be stored: {error}", file=sys.__stderr__, flush=True)
