"""Homes to back up, and archives that were changed by hand, for the tests of backups."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pedro.backup import Restored, make_backup, restore_backup
from pedro.backup.archive import CONTENTS
from pedro.config import Settings
from pedro.store import Database
from pedro.store.dump import dump, read

FROZEN = Path(__file__).parent / "fixtures" / "home_0_1.tar.gz"
Members = dict[str, tuple[tarfile.TarInfo, bytes]]


def settings_of(home: Path, database_url: str | None = None, **env: str) -> Settings:
    """The settings of a home, and of a database that is not in it."""
    url = {"PEDRO_DATABASE_URL": database_url} if database_url else {}
    return Settings.from_env({"PEDRO_HOME": str(home), **url, **env})


def frozen_home(folder: Path) -> tuple[Settings, dict[str, Any]]:
    """A home of release 0.1.0 with adapters, jobs, keys and runs, and what it must hold."""
    with tarfile.open(FROZEN) as archive:
        archive.extractall(folder, filter="data")
    return settings_of(folder / "home"), json.loads((folder / "expected.json").read_text(encoding="utf-8"))


def back_up(settings: Settings, target: Path, **options: Any) -> Path:
    make_backup(settings, target, lambda _: None, **options)
    return target


def restore(settings: Settings, source: Path, **options: Any) -> Restored:
    return restore_backup(settings, source, lambda _: None, **options)


def rows_of(url: str) -> dict[str, list[dict[str, Any]]]:
    """All rows of a store, but for the epoch, and for what backups enter into the audit, in its turn."""
    lines: list[str] = []
    database = Database(url)
    dump(database, lines.append)
    database.close()
    rows: dict[str, list[dict[str, Any]]] = {}
    for table, row in read(lines):
        if row.get("name") in ("epoch", "generation") or str(row.get("action")).startswith("backup."):
            continue
        rows.setdefault(table, []).append(row)
    return {table: sorted(some, key=lambda row: json.dumps(row, sort_keys=True)) for table, some in rows.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def members_of(archive: Path) -> Members:
    with tarfile.open(archive) as tar:
        found = {member.name: (member, tar.extractfile(member)) for member in tar}
        return {name: (member, stream.read() if stream else b"") for name, (member, stream) in found.items()}


def plain(name: str, content: bytes, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, content


def rewritten(archive: Path, target: Path, change: Callable[[Members], Members | None]) -> Path:
    """A copy of an archive with changed members, whose digests are what they were."""
    members = members_of(archive)
    members = change(members) or members
    with tarfile.open(target, "w:gz") as tar:
        for member, content in members.values():
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return target


def with_rows(archive: Path, target: Path, change: Callable[[str], str]) -> Path:
    """A copy of an archive whose rows are others, and whose digests know it."""

    def changed(members: Members) -> None:
        import hashlib

        rows = change(members["store.jsonl"][1].decode()).encode()
        contents = json.loads(members[CONTENTS][1])
        contents["store.jsonl"] = [len(rows), hashlib.sha256(rows).hexdigest()]
        members["store.jsonl"] = (members["store.jsonl"][0], rows)
        members[CONTENTS] = (members[CONTENTS][0], json.dumps(contents).encode())

    return rewritten(archive, target, changed)


def unpacked_bytes(archive: Path) -> bytes:
    return gzip.decompress(archive.read_bytes())
