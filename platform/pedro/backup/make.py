"""Makes a backup while servers and jobs run: first the store as of one moment, then MLflow's database, then files.

Files are written before a row names them and stay while one does, so whatever the store's rows name is among the files
that are read after them. The archive appears whole, by a rename, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pedro import __version__
from pedro.backbones.kept import read_origin
from pedro.backup.archive import REGISTRY, STORE, ArchiveWriter, Hashing, Header, may_be
from pedro.backup.parts import CHECKPOINTS, Places, find_files
from pedro.backup.running_jobs import hold_runs
from pedro.config import backbones_folder, without_password
from pedro.errors import ConfigError, PedroError, UnavailableError
from pedro.refs import NAME, ModelRef
from pedro.registry.snapshot import copy_database
from pedro.store import PLATFORM, Database, JobStatus, Store, exclusive, schema
from pedro.store.dump import Dumped, dump, read

if TYPE_CHECKING:
    from pedro.config import Settings

Log = Callable[[str], None]
MANIFEST_OF_A_VERSION = re.compile(r"artifacts/[^/]+/([^/]+)/artifacts/adapter/pedro_adapter\.json")
TOLD_EVERY = 10  # per cent of the bytes
ENDED = [status.value for status in JobStatus if status.final]


@dataclass(frozen=True)
class Made:
    """What a backup holds."""

    file: str
    bytes: int
    sha256: str
    schema: str
    rows: dict[str, int]
    files: dict[str, int]
    """How many of each part."""
    registry: str
    storage: str
    missing: list[str] = field(default_factory=list)
    """Versions of the store whose files are not in it as they were registered."""
    left_out: list[str] = field(default_factory=list)
    """Files that could not be taken: links, and names that no archive may have."""


def make_backup(settings: Settings, target: Path, log: Log, *, with_backbones: bool = True) -> Made:
    """Write all that the home, its registry and its storage hold into a new file, which only its owner may read.

    Raises ConfigError for a place that cannot be written or a home without a database, UnavailableError for a database
    that does not answer or a disk that is full.
    """
    target, places = target.absolute(), Places.of(settings)
    _check_target(target, places)
    with _written_whole(target) as (stream, scratch):
        header, dumped, kept = _snapshot(settings, places, scratch, log)
        if places.storage is not None:
            hold_runs(places.storage / CHECKPOINTS, kept.unfinished_jobs, scratch / CHECKPOINTS)
        held = scratch / CHECKPOINTS
        files = [*find_files(places, kept.unfinished_jobs, held, with_backbones=with_backbones)]
        total = sum(_size(path) for _, path in files)
        archive = ArchiveWriter(stream, Header(**{**asdict(header), "bytes": total + header.bytes}))
        archive.add(STORE, scratch / STORE)
        if places.registry is not None and (scratch / REGISTRY).exists():
            archive.add(REGISTRY, scratch / REGISTRY)
        left_out = _add_files(archive, files, total, log)
        archive.close()
        missing = [] if places.registry is None else _missing(kept.versions, archive, places)
    counts: dict[str, int] = {}
    for name in archive.entries:
        if "/" in name:
            counts[name.partition("/")[0]] = counts.get(name.partition("/")[0], 0) + 1
    with target.open("rb") as stream:
        hashed = Hashing(stream)
        while hashed.read(1 << 20):
            pass
    _enter(settings, dumped, target, hashed.hexdigest(), log)
    return Made(
        file=str(target),
        bytes=target.stat().st_size,
        sha256=hashed.hexdigest(),
        schema=dumped.schema,
        rows=dumped.rows,
        files=counts,
        registry=header.registry,
        storage=header.storage,
        missing=missing,
        left_out=left_out,
    )


@dataclass
class _Kept:
    """What the store's rows name."""

    versions: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    unfinished_jobs: set[str] = field(default_factory=set)


def _snapshot(settings: Settings, places: Places, scratch: Path, log: Log) -> tuple[Header, Dumped, _Kept]:
    """Write the store's rows and a copy of MLflow's sqlite database; nobody registers a version meanwhile where the
    store is a file too."""
    database = Database(settings.database_url)
    try:
        alone = exclusive(settings.database_url, "backup") if database.is_sqlite and database.exists else nullcontext()
        with alone:
            with (scratch / STORE).open("w", encoding="utf-8") as stream:
                dumped = dump(database, stream.write)
            log(f"store: {sum(dumped.rows.values()):,} rows of schema {dumped.schema}")
            if places.registry is not None and places.registry.is_file():
                copy_database(places.registry, scratch / REGISTRY)
                log(f"registry: MLflow's database, {(scratch / REGISTRY).stat().st_size / 1e6:,.1f} MB")
    finally:
        database.close()
    header = Header(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        release=__version__,
        schema=dumped.schema,
        registry="sqlite" if places.registry is not None else without_password(settings.tracking_uri),
        storage="folder" if places.storage is not None else without_password(settings.storage),
        told=database.is_sqlite and places.registry is not None,
        bytes=sum(path.stat().st_size for path in scratch.iterdir()),
        backbones=_backbones(backbones_folder(settings.home)),
    )
    with (scratch / STORE).open(encoding="utf-8") as lines:
        return header, dumped, _named(read(lines))


def _backbones(folder: Path) -> dict[str, Any]:
    """Those that the home keeps, each with its origin."""
    kept = sorted(path.parent for path in folder.glob("*/config.json") if NAME.fullmatch(path.parent.name))
    origins = {directory.name: read_origin(directory) for directory in kept}
    return {name: origin and {**asdict(origin), "versions": dict(origin.versions)} for name, origin in origins.items()}


def _named(rows: Iterator[tuple[str, dict[str, Any]]]) -> _Kept:
    kept = _Kept()
    for table, row in rows:
        if table == "pedro_versions" and row["deleted"] is None:
            kept.versions.append((str(ModelRef(row["tenant"], row["adapter"], version=row["version"])), row))
        elif table == "pedro_jobs" and row["status"] not in ENDED:
            kept.unfinished_jobs.add(row["id"])
    return kept


def _add_files(archive: ArchiveWriter, files: list[tuple[str, Path]], total: int, log: Log) -> list[str]:
    """Add them; gives those that have no place in an archive. What is gone meanwhile was temporary, or deleted."""
    left_out, done, told = [], 0, 0
    for name, path in files:
        if path.is_symlink() or not may_be(name):
            left_out.append(name)
            continue
        with suppress(FileNotFoundError):
            done += archive.add(name, path).bytes
        if total and 100 * done / total >= told + TOLD_EVERY:
            told = int(100 * done / total)
            log(f"files: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
    return left_out


def _enter(settings: Settings, dumped: Dumped, target: Path, sha256: str, log: Log) -> None:
    """Enter into the audit that a backup was made, where the database is this release's."""
    if dumped.schema != schema.REVISION:
        return
    store = Store(settings.database_url)
    try:
        store.audit("backup.create", PLATFORM, str(target), after={"sha256": sha256})
    except PedroError as error:
        log(f"warning: the audit does not have this backup: {error.message}")
    finally:
        store.close()


def _missing(versions: list[tuple[str, dict[str, Any]]], archive: ArchiveWriter, places: Places) -> list[str]:
    """The versions of which the archive lacks the manifest that was registered."""
    manifests = {match[1]: name for name in archive.entries if (match := MANIFEST_OF_A_VERSION.fullmatch(name))}

    def is_there(row: dict[str, Any]) -> bool:
        name = manifests.get(row["run_id"])
        if name is None:
            return False
        try:
            found = json.loads(places.target(name).read_bytes())
            told = found.get("manifest_digest") or ""
            return found["digest"] == row["digest"] and (
                told == row["manifest_digest"] or "" in (told, row["manifest_digest"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    return [ref for ref, row in versions if not is_there(row)]


def _check_target(target: Path, places: Places) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError(f"file: {target} exists already; name a new file", param="file")
    if not target.parent.is_dir():
        raise ConfigError(f"file: {target.parent} is not a folder; create it first", param="file")
    for folder in places.folders.values():
        if target.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"file: {target} lies in {folder}, which is backed up; name another place", param="file")


@contextmanager
def _written_whole(target: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A stream that becomes `target` when the block ends well, and a folder for what goes into it."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.new-", dir=target.parent) as folder:
            scratch = Path(folder)
            (scratch / "parts").mkdir()
            made = scratch / "archive"
            with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                yield stream, scratch / "parts"
                stream.flush()
                os.fsync(stream.fileno())
            made.rename(target)
    except OSError as error:
        at = f"{error.filename}: " if error.filename else ""
        raise UnavailableError(
            f"file: {target} could not be made ({at}{error.strerror or error}); check permissions and free space; "
            "nothing was kept",
            param="file",
        ) from error


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
