"""Seals on versions: an HMAC, by a secret of the platform, over which version has which weights, manifest and run.

What is taken from MLflow's registry must bear one, so that whoever can write to MLflow, but has not the secret, can
have no weights taken for a tenant's. The first key of the file seals and each of them verifies: a key is replaced by
putting a new one in front, and gone once its line is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.errors import ConfigError
from pedro.registry.tags import PREFIX

if TYPE_CHECKING:
    from pedro.store import Version

TAG = f"{PREFIX}seal"
SHORTEST = 32  # characters of a key


class Seal:
    """The keys in one file, which is made when the first version is sealed."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def of(self, version: Version) -> str:
        """The seal of a version. Raises ConfigError for a file that holds no key."""
        if not self._file.exists():
            _make(self._file)
        return _seal(self._keys()[0], version)

    def holds(self, version: Version, seal: str) -> bool:
        """Whether it is the seal of just this version, by one of the keys."""
        keys = self._keys() if self._file.exists() else []
        return any(hmac.compare_digest(_seal(key, version), seal) for key in keys)

    def _keys(self) -> list[bytes]:
        try:
            lines = self._file.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
            raise ConfigError(
                f"PEDRO_SEAL_KEY_FILE: {self._file} cannot be read ({reason}); check its rights",
                param="PEDRO_SEAL_KEY_FILE",
            ) from error
        if not lines or any(len(line) < SHORTEST for line in lines):
            raise ConfigError(
                f"PEDRO_SEAL_KEY_FILE: {self._file} must hold a key a line, each of {SHORTEST} characters or more; "
                "`openssl rand -hex 32` makes one",
                param="PEDRO_SEAL_KEY_FILE",
            )
        return [line.encode() for line in lines]


def _seal(key: bytes, version: Version) -> str:
    facts = (version.tenant, version.adapter, version.version, version.digest, version.manifest_digest, version.run_id)
    return hmac.new(key, json.dumps(["pedro version", *facts]).encode(), hashlib.sha256).hexdigest()


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
