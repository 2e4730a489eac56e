"""Where the files and backbones that a spec names may lie, so that a stranger's spec reads neither the host nor its
network.

A spec may name files beneath its own folder, the working directory, the home, a local storage and the folders of
PEDRO_DATA_ROOTS, and URLs of the schemes in PEDRO_DATA_SCHEMES. What a person types beside it (an override, an option)
may lie anywhere on this host. A backbone's directory is held to the same places. Opens nothing.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Mapping
from pathlib import Path

from pedro.config import DATA_SCHEMES, Settings
from pedro.errors import ConfigError
from pedro.home import UPLOADS
from pedro.refs import FILE_ID


def check_allowed_files(
    files: Mapping[str, str], settings: Settings, folders: Collection[Path] = (), typed: Collection[str] = ()
) -> None:
    """Raise ConfigError for the first of `files` (absolute, by field) that a spec may not name.

    `folders` are roots beside those of the settings; the fields in `typed` were given by hand.
    """
    for field, location in files.items():
        if FILE_ID.fullmatch(location):  # whose it is, is asked where it is taken
            continue
        if _is_upload(location, settings.storage):
            raise ConfigError(
                f"{field}: {location!r} is where uploaded files lie; name the file by its id, file-…", param=field
            )
        if "://" in location:
            _check_url(field, location, settings)
        elif field not in typed and not any(_beneath(location, root) for root in _roots(settings, folders)):
            raise ConfigError(
                f"{field}: {location!r} lies outside the spec's folder, the working directory and PEDRO_HOME; copy it "
                f"there, type {field}=PATH on the command line, or name its folder in PEDRO_DATA_ROOTS",
                param=field,
            )


def check_allowed_backbones(
    names: Mapping[str, str], settings: Settings, folders: Collection[Path] = (), typed: Collection[str] = ()
) -> None:
    """Raise ConfigError for the first of `names` (as `locate_backbone` gives them, by field) that is a directory which
    a spec may not name. Names of the package and of the home, and hub ids, are no directories."""
    for field, name in names.items():
        if (
            name.startswith("/")
            and field not in typed
            and not any(_beneath(name, root) for root in _roots(settings, folders))
        ):
            raise ConfigError(
                f"{field}: {name!r} lies outside the spec's folder, the working directory and PEDRO_HOME; type "
                f"{field}=PATH on the command line, name its folder in PEDRO_DATA_ROOTS, or have it under a name by "
                "`pedro backbones add`",
                param=field,
            )


def _is_upload(location: str, storage: str) -> bool:
    """Whether it lies among tenants' uploaded files, which are reached by their ids alone."""
    folder = f"{storage.rstrip('/')}/{UPLOADS}"
    if "://" in location or "://" in storage:
        return posixpath.normpath(location).startswith(f"{posixpath.normpath(folder)}/")
    return _beneath(location, Path(folder))


def _check_url(field: str, url: str, settings: Settings) -> None:
    scheme, _, rest = url.partition("://")
    if "::" in url:
        raise ConfigError(f"{field}: {url!r} chains several URLs; give the one that names the file", param=field)
    if url.startswith(f"{settings.storage.rstrip('/')}/") and ".." not in rest.split("/"):
        return
    if scheme not in DATA_SCHEMES:
        known = "a path, pedro://demo/…" + "".join(f" or {name}://" for name in settings.data_schemes)
        raise ConfigError(
            f"{field}: {url!r}: {scheme} is no data scheme; download the file, or give {known}", param=field
        )
    if scheme not in settings.data_schemes:
        raise ConfigError(
            f"{field}: {url!r}: {scheme} is not opened here; set PEDRO_DATA_SCHEMES={scheme} where it should be",
            param=field,
        )


def _roots(settings: Settings, folders: Collection[Path]) -> list[Path]:
    """All but the settings' own roots count only where they are less than the whole disk."""
    given = [*folders, Path.cwd(), settings.home]
    if "://" not in settings.storage:
        given.append(Path(settings.storage))
    return [*(root for root in map(Path.resolve, given) if root != Path(root.anchor)), *map(Path, settings.data_roots)]


def _beneath(location: str, root: Path) -> bool:
    """Whether a file lies in a folder, links followed."""
    return Path(location).resolve().is_relative_to(root.resolve())
