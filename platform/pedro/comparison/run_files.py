"""A comparison's folder on disk: comparison.json, and its runs.

While a comparison runs, every finished run is a file of its own under runs/, written whole or not at all, so that what
is killed can resume. `pack_runs` gathers them into one runs.jsonl, a line a run, which is what a repository keeps.
Both may stand side by side (a packed comparison that was resumed): the file of its own is the newer. cells/ is where
earlier versions kept the runs' files; it is read and never written. imported.json, where it is, holds results of others
(`imported.py`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pedro.comparison.imported import ImportedRun
from pedro.comparison.result_model import Comparison, RunResult
from pedro.errors import ConfigError

LOCK = ".lock"
METADATA, PACKED, IMPORTED = "comparison.json", "runs.jsonl", "imported.json"
RUNS, EARLIER = "runs", "cells"
EQUALITIES = ("parameters", "compute", "effort")


def folder_of(name: str, home: Path, out: Path | None) -> Path:
    """Where a comparison's results are."""
    return (out or home / "comparisons" / name).absolute()


def open_folder(folder: Path) -> None:
    """Make the folder of the results. Raises ConfigError where nothing can be written, before anything is started."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    reason = error.strerror or type(error).__name__
    return ConfigError(f"--out: {folder} cannot be written ({reason}); name another folder", param="--out")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else adds runs to the folder or packs them meanwhile. Raises ConfigError, at once, where another process
    does or where nothing can be written."""
    from filelock import FileLock, Timeout

    open_folder(folder)
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"--out: another `pedro compare` is at work in {folder}; let it end, or name another folder", param="--out"
        ) from None
    except OSError as error:  # another user's lock
        raise _not_writable(folder, error) from error
    with lock:
        yield


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder. Never raises for a broken file: it is named in `problems`, the rest is there."""
    folder = Path(folder)
    problems: list[str] = []
    text = _read(folder / METADATA, METADATA, problems)
    metadata = None if text is None else _parse(text, METADATA, problems)
    runs: list[RunResult] = []
    if metadata is not None:
        metadata = {key: value for key, value in metadata.items() if _fits(key, value, problems)}
        runs, broken = read_runs(folder)
        problems += broken
    imported = _imported(folder, problems) if (folder / IMPORTED).exists() else []
    metadata = metadata or {}
    name = str(metadata.get("name") or folder.name)
    return Comparison(
        folder=folder,
        name=name,
        title=str(metadata.get("title") or name),
        equal=metadata["equal"] if metadata.get("equal") in EQUALITIES else "compute",
        baseline=str(metadata.get("baseline") or ""),
        runs=tuple(runs),
        problems=tuple(problems),
        metadata=metadata,
        imported=tuple(imported),
    )


def read_named(folder: Path, name: str) -> Comparison:
    """What is in the folder. Raises ConfigError for another comparison's, or metadata that cannot be read."""
    comparison = read_comparison(folder)
    if (folder / METADATA).exists() and not comparison.metadata:
        why = "; ".join(comparison.problems) or "it is empty"
        raise ConfigError(
            f"--out: {folder / METADATA} cannot be read ({why}); delete that file: the runs beside it are kept",
            param="--out",
        )
    if comparison.metadata and comparison.name != name:
        raise ConfigError(
            f"--out: {folder} holds the comparison {comparison.name!r}, not {name!r}; name another folder",
            param="--out",
        )
    return comparison


def read_runs(folder: Path) -> tuple[list[RunResult], list[str]]:
    """The runs in a comparison's folder by id, and for each that could not be read where it stands and the reason."""
    stored, problems = _stored(Path(folder))
    return [run for _, run in stored.values()], problems


def write_run(folder: Path, run: RunResult) -> None:
    """Write a run's JSON, whole or not at all; one line a key, so that a changed run is a small change."""
    path = Path(folder) / RUNS / f"{run.id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = run.to_dict().items()
    lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}" for key, value in values)
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def pack_runs(folder: Path) -> int:
    """Gather the runs' own files into runs.jsonl, sorted by id, and remove them; the number of runs.

    Every run keeps each key and value that its file had. Raises ConfigError where there are none, or where one cannot
    be read: then nothing is changed. For who holds the folder.
    """
    folder = Path(folder)
    stored, problems = _stored(folder)
    if problems or not stored:
        why = "; ".join(problems[:3]) or "it holds no runs"
        raise ConfigError(f"{folder} cannot be packed: {why}; remove or fix what is broken, or name another folder")
    lines = (json.dumps(values, ensure_ascii=False) for values, _ in stored.values())
    write_text(folder / PACKED, "".join(f"{line}\n" for line in lines))
    for path in list(_files(folder)):
        path.unlink()
    for name in (RUNS, EARLIER):
        if (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()
    return len(stored)


def count_runs(folder: Path) -> int:
    """About how many runs there are, without reading them."""
    packed = folder / PACKED
    lines = packed.read_bytes().count(b"\n") if packed.is_file() else 0
    return lines + sum(1 for _ in _files(folder))


def last_change(folder: Path) -> float:
    """When the last run was added, or comparison.json changed."""
    changing = [folder / name for name in (METADATA, PACKED, IMPORTED, RUNS, EARLIER)]
    return max((path.stat().st_mtime for path in changing if path.exists()), default=0.0)


def _imported(folder: Path, problems: list[str]) -> list[ImportedRun]:
    """Results of others; none where the file is broken."""
    try:
        return [ImportedRun.from_dict(values) for values in json.loads((folder / IMPORTED).read_text(encoding="utf-8"))]
    except OSError as error:
        problems.append(f"{IMPORTED}: {error.strerror}")
    except (ValueError, TypeError) as error:
        problems.append(f"{IMPORTED}: {error}; import the results again")
    return []


def _stored(folder: Path) -> tuple[dict[str, tuple[dict[str, Any], RunResult]], list[str]]:
    """Every run that can be read, as it stands on disk and checked, sorted by id; and what could not be read."""
    problems: list[str] = []
    runs: dict[str, tuple[dict[str, Any], RunResult]] = {}
    for where, name, text in _texts(folder, problems):
        values = _parse(text, where, problems)
        if values is None:
            continue
        try:
            run = RunResult.from_dict(values)
            if name and run.id != name:
                raise ValueError(f"run.id: expected {name}, as the file is called, got {run.id!r:.60}")
        except (ValueError, TypeError, AttributeError) as error:
            problems.append(f"{where}: {error}")
        else:
            runs[run.id] = (values, run)
    return dict(sorted(runs.items())), problems


def _texts(folder: Path, problems: list[str]) -> Iterator[tuple[str, str, bytes]]:
    """Where a run stands, the id that its file's name promises, and its JSON; what is newer comes later."""
    if (folder / PACKED).exists():
        lines = (_read(folder / PACKED, PACKED, problems) or b"").split(b"\n")
        yield from ((f"{PACKED}:{number}", "", line) for number, line in enumerate(lines, start=1) if line.strip())
    for path in _files(folder):
        where = f"{path.parent.name}/{path.name}"
        text = _read(path, where, problems)
        if text is not None:
            yield where, path.stem, text


def _files(folder: Path) -> Iterator[Path]:
    """The runs that have a file of their own, those of an earlier version first."""
    for name in (EARLIER, RUNS):
        yield from sorted((folder / name).glob("*.json"))


def _read(path: Path, where: str, problems: list[str]) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        problems.append(f"{where}: {error.strerror}")
        return None


def _parse(text: bytes, where: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        values = json.loads(text.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        problems.append(f"{where}: not JSON: {error}")
        return None
    if not isinstance(values, dict):
        problems.append(f"{where}: expected an object, got {type(values).__name__}")
        return None
    return values


def _fits(key: str, value: Any, problems: list[str]) -> bool:
    """Whether a value of comparison.json is of the kind that its readers take; another is a problem, and left out."""
    kind, expected = _METADATA_KINDS.get(key, (object, ""))
    good = value is None or (isinstance(value, kind) and not (kind is not object and isinstance(value, bool)))
    if key == "equal":
        good, expected = value in EQUALITIES, " or ".join(EQUALITIES)
    if not good:
        problems.append(f"{METADATA}: {key}: expected {expected}, got {value!r:.60}")
    return good


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    scratch = path.with_name(f".{path.stem}.{os.getpid()}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


_METADATA_KINDS: dict[str, tuple[Any, str]] = {
    **{key: (str, "text") for key in ("name", "title", "baseline")},
    **{key: (dict, "an object") for key in ("spec", "provenance")},
    "labels": (list, "a list"),
}
