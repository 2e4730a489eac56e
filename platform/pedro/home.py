"""Where the home is, the folder of all local state. Standard library only, so that every room may use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

BACKBONES = "backbones"
SERVER_RECORD = "serve.json"  # where this home serves, while it does
UPLOADS = "files"
"""The folder of the storage in which tenants' uploaded files lie."""


def home_directory(env: Mapping[str, str] = os.environ) -> Path:
    """`PEDRO_HOME`, or `.pedro` in the working directory; absolute, so that it means the same in every process."""
    return Path(env.get("PEDRO_HOME") or ".pedro").expanduser().absolute()


def backbones_folder(home: Path) -> Path:
    """The backbones that were pulled or added, a directory each."""
    return home / BACKBONES
