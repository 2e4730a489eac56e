"""The rows of a comparison's tasks: training files in the storage, and the rows that models are scored on.

Knows nothing of models. Every method sees the same rows.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.data.tasks import Task, TaskRow, get_task
from pedro.errors import DataError
from pedro.training.storage import put_dataset

if TYPE_CHECKING:
    from pedro.comparison.spec import ComparisonSpec, Evaluation, TaskChoice

VALIDATION_SHARE = 0.15  # of the training rows, where a task publishes no validation split


@dataclass(frozen=True)
class TestSet:
    """What a trained model is scored on."""

    task: Task
    rows: tuple[TaskRow, ...]


@dataclass(frozen=True)
class TaskData:
    """A task's rows, cut as the comparison asks. `digest` changes with any of them."""

    task: Task
    train: str
    validation: str
    validation_rows: tuple[TaskRow, ...]
    tests: tuple[TestSet, ...]
    digest: str


def gather(spec: ComparisonSpec, choice: TaskChoice, storage: str) -> TaskData:
    """Read a task's rows and put its training files into the storage. Raises DataError if they cannot be had."""
    task, folder = get_task(choice.task, choice.wording, choice.shots), spec.data_of(choice)
    train, validation = _training_rows(task, folder, choice)
    files = [_stored(task, rows, storage) for rows in (train, validation)]
    tests = tuple(_test_set(spec, other) for other in choice.evaluations)
    parts = [*(Path(file).name for file in files), [_plain(test) for test in tests]]  # stored under their own digests
    digest = hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()
    return TaskData(task, files[0], files[1], tuple(validation), tests, digest)


def _training_rows(task: Task, folder: str | None, choice: TaskChoice) -> tuple[list[TaskRow], list[TaskRow]]:
    rows = list(task.rows("train", folder))
    if "validation" in task.splits(folder):
        train, validation = rows, list(task.rows("validation", folder))
    else:
        train = [row for row in rows if _share(row) >= VALIDATION_SHARE]
        validation = [row for row in rows if _share(row) < VALIDATION_SHARE]
    if not train or not validation:
        raise DataError(f"{task.name}: {len(rows)} training rows leave nothing to validate on; bring more of them")
    return _sample(train, choice.train_rows), _sample(validation, choice.validation_rows)


def _test_set(spec: ComparisonSpec, choice: Evaluation) -> TestSet:
    task = get_task(choice.task, choice.wording, choice.shots)
    rows = tuple(task.rows("test", spec.data_of(choice), choice.test_rows))
    if not rows:
        raise DataError(f"{task.name}: there are no test rows to score on; look at its files", param="data")
    return TestSet(task, rows)


def _stored(task: Task, rows: Sequence[TaskRow], storage: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{task.name}.jsonl"
        lines = (json.dumps(task.line(row), ensure_ascii=False) for row in rows)
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return put_dataset(str(file), storage)


def _sample(rows: list[TaskRow], most: int | None) -> list[TaskRow]:
    """All rows, or the `most` with the smallest hashes, in their order."""
    if most is None or len(rows) <= most:
        return rows
    return [rows[i] for i in sorted(sorted(range(len(rows)), key=lambda i: (_share(rows[i], b"sample"), i))[:most])]


def _share(row: TaskRow, salt: bytes = b"") -> float:
    """A fraction from a hash of the prompt, so that equal prompts fall on one side."""
    text = (row.prompt + row.input).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=b"pedro compare" + salt).digest()) / 2**64


def _plain(test: TestSet) -> list[object]:
    rows = [[row.prompt, row.input, row.completion, row.references, row.group] for row in test.rows]
    return [test.task.name, test.task.wording, test.task.shots, rows]
