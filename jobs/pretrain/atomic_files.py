"""Files that are replaced atomically, and a check that they can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EISDIR
from pathlib import Path

from pedro.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to within; afterwards what is there takes the place of `path`."""
    scratch = path.with_name(f"{path.name}.new")
    yield scratch
    scratch.replace(path)


def check_writable(field: str, path: Path) -> None:
    """Make the folder of `path`; raise ConfigError where no file can be written to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
    except OSError as error:
        raise ConfigError(
            f"{field}: {str(path)!r} cannot be written: {error.strerror}; choose another path", param=field
        ) from None
