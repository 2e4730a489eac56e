"""Files of secret keys, a key a line: made when the first is needed, read by each process that has the same file.

The first key makes what is new and each of them is good for what was made with it: a key is replaced by putting a new
one in front, and gone once its line is. Knows no setting by name.
"""

from __future__ import annotations

import os
import secrets
import uuid
from contextlib import suppress
from pathlib import Path

from pedro.errors import ConfigError

SHORTEST = 32  # characters of a key


class KeyFile:
    """One such file. `setting` is the variable that names it, for errors."""

    def __init__(self, file: Path, setting: str) -> None:
        self._file, self._setting = file, setting

    def first(self) -> bytes:
        """The key that makes what is new; the file is made if it is not there. Raises ConfigError without one."""
        try:
            if not self._file.exists():
                _make(self._file)
        except OSError as error:
            raise ConfigError(
                f"{self._setting}: {self._file} cannot be made ({error.strerror}); name a file with a key, as "
                "`openssl rand -hex 32` makes one",
                param=self._setting,
            ) from error
        return self._read()[0]

    def all(self) -> list[bytes]:
        """All of them; none where there is no file. Raises ConfigError for a file that holds no key."""
        return self._read() if self._file.exists() else []

    def _read(self) -> list[bytes]:
        try:
            lines = self._file.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
            raise ConfigError(
                f"{self._setting}: {self._file} cannot be read ({reason}); check its permissions", param=self._setting
            ) from error
        if not lines or any(len(line) < SHORTEST for line in lines):
            raise ConfigError(
                f"{self._setting}: {self._file} must hold a key a line, each of {SHORTEST} characters or more; "
                "`openssl rand -hex 32` makes one",
                param=self._setting,
            )
        return [line.encode() for line in lines]


def _make(file: Path) -> None:
    """A file with a new key, whole at once; of two processes the second takes the first one's."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(32) + "\n")
        with suppress(FileExistsError):
            os.link(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
