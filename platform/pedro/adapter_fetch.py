"""Fetches an adapter's files from behind a URL: a folder of any system of fsspec, or a repository of the hub.

Only files that an adapter may have are asked for. What they hold is judged by whoever opens the copy.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pedro.adapter_check import KNOWN
from pedro.adapter_directory import WEIGHTS
from pedro.errors import AdapterError, PedroError, UnavailableError

HUB = "hf"
MOST_FILES = 1000
PICKLED = Path(WEIGHTS).with_suffix(".bin").name


@contextmanager
def fetched(location: str) -> Iterator[Path]:
    """The adapter directory at a path, or a copy of the one behind a URL, there while the block runs.

    `s3://bucket/folder` and the like are read with the provider's own credentials; `hf://owner/name`, also with
    `@revision` and a folder, at the commit that the hub has of it now. Raises UnavailableError where the place does
    not answer or the disk is too small, AdapterError where no adapter lies there.
    """
    if "://" not in location:
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="pedro-import-") as folder:
        try:
            _fetch(location, Path(folder))
        except PedroError:
            raise
        except FileNotFoundError as error:
            raise AdapterError(f"directory: {location} is not there; check its name", param="directory") from error
        except Exception as error:  # fsspec's systems raise any type
            raise _failed(location, error) from error
        yield Path(folder)


def _fetch(location: str, folder: Path) -> None:
    from fsspec.core import url_to_fs

    system, root = url_to_fs(location)
    if HUB in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        root = _at_one_commit(system, root)
    entries = {str(entry["name"]).rstrip("/").rpartition("/")[2]: entry for entry in system.ls(root, detail=True)}
    wanted = {name: entry for name, entry in entries.items() if KNOWN.fullmatch(name) and entry["type"] == "file"}
    if PICKLED in entries and WEIGHTS not in entries:
        raise AdapterError(
            f"{PICKLED}: may contain code (pickle) and is refused; load it where you trust it and save it again with "
            "model.save_pretrained(directory, safe_serialization=True)"
        )
    if not wanted or len(wanted) > MOST_FILES:
        raise AdapterError(
            f"directory: {location} holds {len(wanted):,} files of an adapter; give the folder of one",
            param="directory",
        )
    size, free = sum(int(entry["size"] or 0) for entry in wanted.values()), shutil.disk_usage(folder).free
    if size > free:
        raise UnavailableError(
            f"directory: {location} takes {size / 1e6:,.0f} MB on the disk of {folder.parent}, which has "
            f"{free / 1e6:,.0f} MB free; free some, or set TMPDIR to a folder on another disk",
            param="directory",
        )
    for name, entry in wanted.items():
        system.get_file(entry["name"], str(folder / name))


def _at_one_commit(system: Any, path: str) -> str:
    """The same folder at the commit that its branch is at now, so that all files are of one."""
    from huggingface_hub import HfApi

    place = system.resolve_path(path)
    if getattr(place, "repo_type", "") != "model":
        raise AdapterError(f"directory: hf://{path} is no repository of a model", param="directory")
    sha = HfApi(endpoint=system.endpoint, token=system.token).model_info(place.repo_id, revision=place.revision).sha
    return f"{place.repo_id}@{sha}/{place.path_in_repo}".rstrip("/")


def _failed(location: str, error: Exception) -> UnavailableError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:300] or type(error).__name__
    return UnavailableError(
        f"directory: {location} could not be read ({reason}); check the place, its rights and keys, and that what its "
        "scheme needs is installed (pip install 'pedro-platform[services]' for s3://)",
        param="directory",
    )
