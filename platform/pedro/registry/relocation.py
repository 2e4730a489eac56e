"""Lets a home be moved or copied: MLflow's rows hold absolute paths of artifacts, rewritten here in its own tables."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("model_versions", "storage_location"))


def relocate(database: Path, artifact_root: Path) -> None:
    """Make rows of an sqlite store name the artifacts of its own home, where they name those of where it was before.

    Only experiments whose folder lies in this home's artifacts are meant: others were put elsewhere on purpose.
    """
    if database.parent != artifact_root.parent or not artifact_root.is_dir():
        return
    here = artifact_root.as_uri()
    with closing(sqlite3.connect(database, timeout=20)) as link:
        rows = link.execute("SELECT name, artifact_location FROM experiments WHERE name != 'Default'").fetchall()
        roots = {
            location.removesuffix(f"/{name}")
            for name, location in rows
            if location.startswith("file:") and location.endswith(f"/{name}") and (artifact_root / name).is_dir()
        }
        for root in roots - {here}:
            for table, column in COLUMNS:
                link.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 (names of this file)
                    f"WHERE substr({column}, 1, ?) = ?",
                    (here, len(root) + 1, len(root) + 1, f"{root}/"),
                )
        link.commit()
