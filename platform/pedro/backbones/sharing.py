"""Copies of the home's backbones in the storage, from which jobs and replicas on other hosts take them by name.

Only for a storage that lies outside the home: where the home is the storage, or is shared itself, nothing is copied.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import named_directory, resolve_backbone
from pedro.backbones.kept import Log, find_kept, locked, made_whole
from pedro.config import BACKBONES
from pedro.errors import BackboneError, UnavailableError
from pedro.refs import NAME

if TYPE_CHECKING:
    from pedro.config import Settings


def offer_backbone(settings: Settings, name: str, log: Log = lambda _line: None) -> None:
    """Have a kept backbone in the storage, before a job or a server names it. Does nothing for any other.

    Raises UnavailableError where the storage cannot be written.
    """
    directory = find_kept(settings.home, name)
    if directory is None or settings.storage_in_home:
        return
    digest = resolve_backbone(name).digest
    try:
        system, root = _place(settings)
        if (_offered(system, root, name) or {}).get("digest") == digest:
            return
        log(f"copying {name} to the storage, for workers on other hosts")
        folder = f"{root}/{name}/{digest.removeprefix('sha256:')[:16]}"
        system.makedirs(folder, exist_ok=True)
        files = sorted(path.name for path in directory.iterdir() if path.is_file())
        for file in files:
            system.put_file(str(directory / file), f"{folder}/{file}")
        with tempfile.NamedTemporaryFile("w", suffix=".json") as record:  # last: what it names is whole
            json.dump({"digest": digest, "folder": folder, "files": files}, record)
            record.flush()
            system.put_file(record.name, f"{root}/{name}.json")
    except Exception as error:  # fsspec's systems raise any type
        raise _storage_error(settings, name, error) from error


def obtain_backbone(settings: Settings, name: str, log: Log = lambda _line: None) -> None:
    """Have here what the storage offers under this name, for a worker or a replica that is about to load it.

    Raises BackboneError where this host has another backbone of that name, UnavailableError where the storage cannot
    be read. A name that the storage does not offer is left to `resolve_backbone`.
    """
    if not NAME.fullmatch(name) or settings.storage_in_home:
        return
    if named_directory(name) is not None and find_kept(settings.home, name) is None:  # packaged
        return
    try:
        system, root = _place(settings)
        offered = _offered(system, root, name)
    except Exception as error:
        raise _storage_error(settings, name, error) from error
    if offered is None:
        return
    with locked(settings.home, name, log):
        if find_kept(settings.home, name) is None:
            with made_whole(settings.home, name) as folder:
                _get(settings, system, offered, folder)
                if resolve_backbone(str(folder)).digest != offered["digest"]:
                    raise BackboneError(f"backbone: the copy of {name!r} in the storage is damaged", param="backbone")
    if resolve_backbone(name).digest != offered["digest"]:
        raise BackboneError(
            f"backbone: {name!r} on this host differs from the job's; `pedro backbones remove {name}` here, and "
            "the job's is taken from the storage",
            param="backbone",
        )


def withdraw_backbone(settings: Settings, name: str) -> None:
    """Remove the storage's copy of a backbone that is removed."""
    if settings.storage_in_home:
        return
    try:
        system, root = _place(settings)
        for place in (f"{root}/{name}.json", f"{root}/{name}"):
            if system.exists(place):
                system.rm(place, recursive=True)
    except Exception as error:
        raise _storage_error(settings, name, error) from error


def _get(settings: Settings, system: Any, offered: dict[str, Any], folder: Path) -> None:
    for file in offered["files"]:
        if Path(file).name != file or file.startswith("."):
            raise BackboneError(f"backbone: {settings.storage} names the file {file!r}", param="backbone")
        system.get_file(f"{offered['folder']}/{file}", str(folder / file))


def _offered(system: Any, root: str, name: str) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads(system.cat_file(f"{root}/{name}.json"))
    except FileNotFoundError:
        return None
    return facts


def _place(settings: Settings) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(settings.storage)
    return system, f"{path.rstrip('/')}/{BACKBONES}"


def _storage_error(settings: Settings, name: str, error: Exception) -> UnavailableError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__
    return UnavailableError(
        f"PEDRO_STORAGE: {name!r} could not be copied between this host and {settings.storage} ({reason}); check the "
        "place, its rights and keys, and its free space",
        param="PEDRO_STORAGE",
    )
