"""Seals on versions: an HMAC, by a secret of the platform, over which version has which weights, manifest and run.

What is taken from MLflow's registry must bear one, so that whoever can write to MLflow, but has not the secret, can
have no weights taken for a tenant's. The first key of the file seals and each of them verifies.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.key_files import KeyFile
from pedro.registry.tags import PREFIX

if TYPE_CHECKING:
    from pedro.store import Version

TAG = f"{PREFIX}seal"


class Seal:
    """The keys in one file, which is made when the first version is sealed."""

    def __init__(self, file: Path) -> None:
        self._keys = KeyFile(file, "PEDRO_SEAL_KEY_FILE")

    def of(self, version: Version) -> str:
        """The seal of a version. Raises ConfigError for a file that holds no key."""
        return _seal(self._keys.first(), version)

    def holds(self, version: Version, seal: str) -> bool:
        """Whether it is the seal of just this version, by one of the keys."""
        return any(hmac.compare_digest(_seal(key, version), seal) for key in self._keys.all())


def _seal(key: bytes, version: Version) -> str:
    facts = (version.tenant, version.adapter, version.version, version.digest, version.manifest_digest, version.run_id)
    return hmac.new(key, json.dumps(["pedro version", *facts]).encode(), hashlib.sha256).hexdigest()
