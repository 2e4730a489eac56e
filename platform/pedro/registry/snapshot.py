"""Copies MLflow's sqlite database while others write to it, for backups, and says whether one holds anything."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from pedro.errors import UnavailableError

HOLDING = ("runs", "registered_models")  # what a database has rows of as soon as it is used
PATIENCE_S = 60


def copy_database(source: Path, target: Path) -> None:
    """Copy it as of one moment. Raises UnavailableError where it cannot be read, or is damaged."""
    try:
        with closing(_reader(source)) as old, closing(sqlite3.connect(target)) as copy:
            old.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, whatever the other is
            found = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        raise UnavailableError(f"MLflow's database {source} cannot be copied ({error}); try again") from error
    if found != "ok":
        raise UnavailableError(f"MLflow's database {source} is damaged ({found}); restore an earlier backup of it")


def is_blank(database: Path) -> bool:
    """Whether there is no such file, or nothing was entered in it but MLflow's schema."""
    if not database.is_file() or not database.stat().st_size:
        return True
    try:
        with closing(_reader(database)) as link:
            return all(link.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() is None for name in HOLDING)  # noqa: S608
    except sqlite3.Error:
        return False  # it is something else


def _reader(database: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE_S)
