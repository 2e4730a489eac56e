"""Where a number comes from: commit, code, hardware and versions, as result files carry them. Standard library only."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pedro.errors import ConfigError

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "mlflow")
CHECKOUT = Path(__file__).parents[2]
CODE = ("platform", "jobs")  # what computes, below a checkout
RESULTS = "jobs/results"  # what was computed: no part of the code
SUFFIXES = {".py", ".c", ".h", ".yaml"}


def provenance(code: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Code (its state now, unless that of an earlier moment is given), time (UTC), hardware and versions."""
    return {
        **(code or code_state()),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "machine": platform.machine()},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def code_state(checkout: Path = CHECKOUT) -> dict[str, str | None]:
    """`commit`, with a `+` where code has changed since (None outside a checkout), and `code`, a hash of the files.

    Results are not counted. Outside a checkout `code` is the hash of the package's files alone.
    """
    if (checkout / "platform" / "pedro" / Path(__file__).name).is_file():
        return {"commit": _commit(checkout), "code": _hash(checkout, CODE)}
    package = Path(__file__).parent
    return {"commit": None, "code": _hash(package.parent, (package.name,))}


def check_unchanged(code: Mapping[str, str | None], target: Path, allow_dirty: bool) -> None:
    """Raise ConfigError for a result that would be committed (lies below jobs/results) but whose code is not.

    With `allow_dirty` the result is made all the same; the `+` at its commit marks it.
    """
    committed = target.resolve().is_relative_to((CHECKOUT / RESULTS).resolve())
    if committed and (code["commit"] or "").endswith("+") and not allow_dirty:
        raise ConfigError(
            f"{target}: code has changed since commit {code['commit']}; commit it first, write elsewhere, "
            "or mark the result with --allow-dirty",
            param="out",
        )


def _hash(root: Path, folders: tuple[str, ...]) -> str:
    """sha256 over the names and contents of the code in folders of `root`."""
    digest = hashlib.sha256()
    files = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SUFFIXES]
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        if not name.startswith(f"{RESULTS}/"):
            data = path.read_bytes()
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return f"sha256:{digest.hexdigest()}"


@functools.cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True, timeout=10).stdout

    try:
        changed = git("status", "--porcelain", "--", *CODE, f":(exclude){RESULTS}").strip()
        return git("rev-parse", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
