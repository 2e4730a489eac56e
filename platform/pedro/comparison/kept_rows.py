"""The rows behind a run's scores: prompt, expected answer, actual answer, score; compressed and bounded.

They lie in `rows/` beside a comparison's runs, whether or not those are packed. Runs ask the same questions, so these
are a file of their own, named by their content, and each run keeps only its answers and scores.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pedro.data.tasks import TaskRow

ROWS = "rows"
MOST_ROWS = 2000  # of a test set
MOST_CHARS = 2000  # of a text; of a prompt its end is kept, which holds the question
MOST_BYTES = 64 * 2**20  # unpacked, of a file that is read back
_NAME = re.compile(r"[0-9A-Za-z._-]{1,120}")


@dataclass(frozen=True)
class AnsweredRow:
    """One row; `score` is the task's own metric of it, 1 where the answer is right."""

    prompt: str
    wanted: str
    answer: str
    score: float


@dataclass(frozen=True)
class AnsweredTask:
    """The first rows of one test set."""

    task: str
    rows: tuple[AnsweredRow, ...]


def answered(task: str, rows: Sequence[TaskRow], answers: Sequence[str], scores: Iterable[float]) -> AnsweredTask:
    """What is kept of a test set that was asked and scored."""
    asked = list(zip(rows, answers, scores, strict=True))[:MOST_ROWS]
    kept = (
        AnsweredRow(
            "\n".join(message["content"] for message in row.messages)[-MOST_CHARS:],
            row.completion[:MOST_CHARS],
            answer[:MOST_CHARS],
            round(score, 4),
        )
        for row, answer, score in asked
    )
    return AnsweredTask(task, tuple(kept))


def write_rows(folder: Path, run: str, tasks: Sequence[AnsweredTask]) -> None:
    """Keep a run's rows, whole or not at all; nothing where there are none."""
    if not tasks:
        return
    place = Path(folder) / ROWS
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for each in tasks:
        questions = "".join(_line([row.prompt, row.wanted]) for row in each.rows)
        name = f"questions-{hashlib.sha256(questions.encode('utf-8', 'replace')).hexdigest()[:16]}"
        if not _path(place, name).exists():
            _write(_path(place, name), questions)
        answers, scores = [row.answer for row in each.rows], [row.score for row in each.rows]
        lines.append(_line({"task": each.task, "questions": name, "answers": answers, "scores": scores}))
    _write(_path(place, run), "".join(lines))


def kept_runs(folder: Path) -> set[str]:
    """The ids of the runs whose rows are kept."""
    names = (path.name.removesuffix(".jsonl.gz") for path in (Path(folder) / ROWS).glob("*.jsonl.gz"))
    return {name for name in names if not name.startswith("questions-")}


def read_rows(folder: Path, run: str, task: str) -> list[AnsweredRow]:
    """A run's rows of a test set; none where none were kept. Raises ValueError for what is broken or too large."""
    place = Path(folder) / ROWS
    for kept in _read(place, run):
        if isinstance(kept, dict) and kept.get("task") == task:
            try:
                questions = _read(place, kept["questions"])
                asked = zip(questions, kept["answers"], kept["scores"], strict=True)
                return [
                    AnsweredRow(str(prompt), str(wanted), str(answer), float(score))
                    for (prompt, wanted), answer, score in asked
                ]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"the rows of run {run} cannot be read ({type(error).__name__}: {error})") from error
    return []


def _line(values: Any) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _path(place: Path, name: str) -> Path:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r:.60} names no file of rows")
    return place / f"{name}.jsonl.gz"


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.new")
    scratch.write_bytes(gzip.compress(text.encode("utf-8", "replace"), mtime=0))
    scratch.replace(path)


def _read(place: Path, name: str) -> list[Any]:
    path = _path(place, name)
    try:
        with gzip.open(io.BytesIO(path.read_bytes()), "rt", encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return []
    except (OSError, EOFError) as error:
        raise ValueError(f"{path.name} cannot be read ({type(error).__name__})") from error
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path.name} holds more than {MOST_BYTES:,} characters")
    try:
        return [json.loads(line) for line in text.splitlines() if line]
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read (not JSON)") from error
