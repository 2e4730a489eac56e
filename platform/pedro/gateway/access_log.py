"""The file of the access log, which the gateways of a host share: rotated by whichever finds it full.

What a request's line says is written where every request passes (`edge.py`).
"""

from __future__ import annotations

import logging
import os
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock

from pedro.gateway.edge import access
from pedro.log_lines import JSON, TEXT, JsonLines

MAX_FILE_BYTES, KEPT_FILES = 10 * 2**20, 3


class SharedFileHandler(RotatingFileHandler):
    """A file shared by the gateways of a host: the one that finds it full renames it, and the others reopen it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._follow()
        except OSError:  # it cannot be opened: lose the line, not the request
            self.handleError(record)
        else:
            super().emit(record)

    def doRollover(self) -> None:
        with FileLock(f"{self.baseFilename}.lock"):
            self._follow()
            if os.path.getsize(self.baseFilename) > self.maxBytes / 2:  # another gateway may have rotated it
                super().doRollover()

    def _follow(self) -> None:
        stream: TextIO | None = self.stream
        if stream is None:  # closed, e.g. by a logging reconfiguration: reopened on demand
            return
        try:
            followed = os.path.samestat(os.stat(self.baseFilename), os.fstat(stream.fileno()))
        except OSError:  # being renamed
            followed = False
        if not followed:
            stream.close()
            none: Any = None  # while it cannot be opened
            self.stream = none
            self.stream = self._open()


def write_to(path: Path, form: str = TEXT) -> None:
    """Log to a file rotated at `MAX_FILE_BYTES`, keeping the last few; `form` is one of `log_lines.FORMATS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = SharedFileHandler(path, maxBytes=MAX_FILE_BYTES, backupCount=KEPT_FILES, encoding="utf-8")
    handler.setFormatter(JsonLines() if form == JSON else logging.Formatter("%(asctime)s %(message)s"))
    access.handlers[:] = [handler]
    access.propagate = False
    access.setLevel(logging.INFO)
