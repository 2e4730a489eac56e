"""Checks the locations of files and backbones in a spec, so that an untrusted spec can read neither the host's files
nor its network.

A spec may name files below its own folder, the working directory, the home, a local storage and the folders of
PEDRO_DATA_ROOTS, and URLs with the schemes in PEDRO_DATA_SCHEMES. Paths given on the command line (an override, an
option) may be anywhere on this host. The same rules apply to a backbone's directory. Opens no files.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from pedro.config import DATA_SCHEMES, UPLOADS, Settings
from pedro.errors import ConfigError
from pedro.refs import FILE_ID


def check_allowed_files(
    files: Mapping[str, str], settings: Settings, folders: Collection[Path] = (), typed: Collection[str] = ()
) -> None:
    """Raise ConfigError for the first of `files` (absolute, by field) that a spec may not name.

    `folders` are roots in addition to those of the settings; the fields in `typed` were given on the command line.
    """
    for field, location in files.items():
        if FILE_ID.fullmatch(location):  # its tenant is checked where it is fetched
            continue
        if _is_upload(location, settings.storage):
            raise ConfigError(
                f"{field}: {location!r} is among uploaded files; name the file by its id, file-…", param=field
            )
        if "://" in location:
            _check_url(field, location, settings)
        elif field not in typed and not any(_beneath(location, root) for root in _roots(settings, folders)):
            raise ConfigError(
                f"{field}: {location!r} lies outside the spec's folder, the working directory and PEDRO_HOME; copy it "
                f"there, pass {field}=PATH on the command line, or add its folder to PEDRO_DATA_ROOTS",
                param=field,
            )


def check_allowed_backbones(
    names: Mapping[str, str], settings: Settings, folders: Collection[Path] = (), typed: Collection[str] = ()
) -> None:
    """Raise ConfigError for the first of `names` (as returned by `locate_backbone`, by field) that is a directory which
    a spec may not name. Names of packaged and kept backbones, and hub ids, are not directories."""
    for field, name in names.items():
        if (
            name.startswith("/")
            and field not in typed
            and not any(_beneath(name, root) for root in _roots(settings, folders))
        ):
            raise ConfigError(
                f"{field}: {name!r} lies outside the spec's folder, the working directory and PEDRO_HOME; pass "
                f"{field}=PATH on the command line, add its folder to PEDRO_DATA_ROOTS, or give it a name with "
                "`pedro backbones add`",
                param=field,
            )


def _is_upload(location: str, storage: str) -> bool:
    """Whether it is among tenants' uploaded files, which may only be used by id."""
    folder = f"{storage.rstrip('/')}/{UPLOADS}"
    if "://" in location or "://" in storage:
        return posixpath.normpath(location).startswith(f"{posixpath.normpath(folder)}/")
    return _beneath(location, Path(folder))


def _check_url(field: str, url: str, settings: Settings) -> None:
    scheme, _, rest = url.partition("://")
    if "::" in url:
        raise ConfigError(f"{field}: {url!r} chains several URLs; give only the file's", param=field)
    if url.startswith(f"{settings.storage.rstrip('/')}/") and ".." not in rest.split("/"):
        return
    if scheme not in DATA_SCHEMES:
        known = "a path, pedro://demo/…" + "".join(f" or {name}://" for name in settings.data_schemes)
        raise ConfigError(
            f"{field}: {url!r}: {scheme} is not a data scheme; download the file, or use {known}", param=field
        )
    if scheme not in settings.data_schemes:
        raise ConfigError(
            f"{field}: {url!r}: {scheme} is not allowed here; set PEDRO_DATA_SCHEMES={scheme} to allow it",
            param=field,
        )


def _roots(settings: Settings, folders: Collection[Path]) -> list[Path]:
    """The allowed roots; those not from the settings are ignored if they are the whole disk."""
    given = [*folders, Path.cwd(), settings.home]
    if "://" not in settings.storage:
        given.append(Path(settings.storage))
    return [*(root for root in map(Path.resolve, given) if root != Path(root.anchor)), *map(Path, settings.data_roots)]


def _beneath(location: str, root: Path) -> bool:
    """Whether a file is in a folder, after resolving links."""
    return Path(location).resolve().is_relative_to(root.resolve())


def typed_fields(fields: Iterable[str], overrides: Iterable[str]) -> set[str]:
    """Those of the fields that an override (`key=value`) gives, alone, with others or in part."""
    keys = {override.partition("=")[0] for override in overrides}
    return {
        field
        for field in fields
        if any(f"{field}.".startswith(f"{key}.") or key.startswith(f"{field}.") for key in keys)
    }
