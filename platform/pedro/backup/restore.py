"""Restores a backup into an empty home. Everything is read and verified before any of it becomes visible.

The store's rows come last, in one transaction that is committed once all files are in their places: what no row names
is not there for anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backup.archive import Header, MemberDigest, Sink, nowhere, read_archive
from pedro.backup.parts import Places
from pedro.backup.staging import Staging
from pedro.config import without_password
from pedro.errors import ConfigError, UnavailableError
from pedro.store import Database
from pedro.store.dump import Dumped, check_empty, check_schema, load

if TYPE_CHECKING:
    from pedro.config import Settings

Log = Callable[[str], None]


@dataclass(frozen=True)
class Restored:
    """What was restored, or would be."""

    file: str
    created: str
    release: str
    schema: str
    rows: dict[str, int]
    files: dict[str, int]
    """How many of each part."""
    lacking: dict[str, Any] = field(default_factory=dict)
    """Backbones that the home had and the archive does not hold, each with its origin."""
    unseen: list[str] = field(default_factory=list)
    """What belongs to it and is elsewhere: MLflow's server, a bucket."""


def restore_backup(
    settings: Settings, source: Path, log: Log, *, dry_run: bool = False, sha256: str | None = None
) -> Restored:
    """Restore the archive `source` into an empty home; with `dry_run` only say whether it is whole.

    Raises ConfigError for a file that is no backup, was damaged, or does not fit the settings, ConflictError for a
    home that is not empty, UnavailableError for a disk that is full. Nothing was changed then.
    """
    if dry_run:
        return _look(source, log, sha256)
    places, database = Places.of(settings), Database(settings.database_url)
    try:
        check_empty(database)
        with closing(Staging(places, settings.home)) as staging:
            staging.check_empty()
            header, entries = _read(settings, source, staging.sink, log, sha256)
            log(f"verified: {len(entries):,} files; entering the store's rows")
            dumped = _enter(database, header, staging)
    except OSError as error:
        at = f"{error.filename}: " if error.filename else ""
        raise UnavailableError(
            f"file: {source} could not be restored ({at}{error.strerror or error}); check the home's rights and free "
            "space; nothing was kept",
            param="file",
        ) from error
    finally:
        database.close()
    return _told(source, header, entries, dumped.rows)


def _look(source: Path, log: Log, sha256: str | None) -> Restored:
    """Read an archive and keep nothing."""
    headers: list[Header] = []

    def begin(header: Header) -> Sink:
        check_schema(header.schema)
        headers.append(header)
        log(_told_of(header))
        return nowhere

    entries = read_archive(source, begin, sha256)
    return _told(source, headers[0], entries, {})


def _read(
    settings: Settings, source: Path, sink: Sink, log: Log, sha256: str | None
) -> tuple[Header, dict[str, MemberDigest]]:
    headers: list[Header] = []

    def begin(header: Header) -> Sink:
        check_schema(header.schema)
        _check_settings(settings, header)
        headers.append(header)
        log(f"{_told_of(header)}, about {header.bytes / 1e6:,.1f} MB")
        return sink

    entries = read_archive(source, begin, sha256)
    return headers[0], entries


def _enter(database: Database, header: Header, staging: Staging) -> Dumped:
    existed = database.exists
    try:
        with staging.rows.open(encoding="utf-8") as lines:
            return load(database, header.schema, lines, told=header.told, publish=staging.publish)
    except BaseException:
        staging.undo()
        database.close()
        if database.file is not None and not existed:
            for ending in ("", "-wal", "-shm", ".moves.lock"):
                database.file.with_name(f"{database.file.name}{ending}").unlink(missing_ok=True)
        raise


def _check_settings(settings: Settings, header: Header) -> None:
    """Refuse where the archive's parts have no place, or where parts that are needed are not in it."""
    places = Places.of(settings)
    if (header.registry == "sqlite") != (places.registry is not None):
        remedy = "unset MLFLOW_TRACKING_URI, so that it has a place in the home"
        if header.registry != "sqlite":
            remedy = f"set MLFLOW_TRACKING_URI to that server ({header.registry}), restored by its own tools"
        here = without_password(settings.tracking_uri)
        raise ConfigError(
            f"MLFLOW_TRACKING_URI: the backup was made beside MLflow on {header.registry}, and here it is {here}; "
            f"{remedy}",
            param="MLFLOW_TRACKING_URI",
        )
    if (header.storage == "folder") != (places.storage is not None):
        remedy = "unset PEDRO_STORAGE or set it to a folder"
        if header.storage != "folder":
            remedy = f"set PEDRO_STORAGE to {header.storage}, which keeps its own copies"
        raise ConfigError(
            f"PEDRO_STORAGE: the backup was made with {header.storage}, and here it is {settings.storage}; {remedy}",
            param="PEDRO_STORAGE",
        )


def _told(source: Path, header: Header, entries: dict[str, MemberDigest], rows: dict[str, int]) -> Restored:
    files: dict[str, int] = {}
    for part in (name.partition("/")[0] for name in entries if "/" in name):
        files[part] = files.get(part, 0) + 1
    held = {name.split("/")[1] for name in entries if name.startswith("backbones/")}
    unseen = [place for place in (header.registry, header.storage) if place not in ("sqlite", "folder")]
    return Restored(
        file=str(source),
        created=header.created,
        release=header.release,
        schema=header.schema,
        rows=rows,
        files=files,
        lacking={name: origin for name, origin in header.backbones.items() if name not in held},
        unseen=unseen,
    )


def _told_of(header: Header) -> str:
    return f"backup of {header.created}, made by pedro {header.release}, schema {header.schema}"
