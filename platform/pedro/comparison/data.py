"""The rows of a comparison's tasks: training files in the storage, and the rows that models are scored on.

Independent of models: every method sees the same rows.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.comparison.spec import Evaluation
from pedro.data.tasks import Task, TaskRow, get_task
from pedro.errors import DataError
from pedro.training.storage import put_dataset

if TYPE_CHECKING:
    from pedro.comparison.spec import ComparisonSpec, TaskChoice

VALIDATION_SHARE = 0.15  # of the training rows, where a task publishes no validation split


@dataclass(frozen=True)
class TestSet:
    """What a trained model is scored on."""

    task: Task
    rows: tuple[TaskRow, ...]


@dataclass(frozen=True)
class TaskData:
    """A task's rows, cut as the comparison asks. `digest` changes with any of them.

    `files` are those to train and to validate on; `chats` the same rows as conversations, for backbones that have a
    chat template, where the wording has that. `general` is another task, which tells what tuning forgot.
    """

    task: Task
    files: tuple[str, str]
    chats: tuple[str, str] | None
    train_rows: tuple[TaskRow, ...]
    validation_rows: tuple[TaskRow, ...]
    tests: tuple[TestSet, ...]
    digest: str
    general: TestSet | None = None


@cache
def has_chat_template(backbone: str) -> bool:
    """Whether the backbone's tokenizer has a chat template of its own. Raises BackboneError."""
    return bool(load_tokenizer(resolve_backbone(backbone)).chat_template)


def gather(spec: ComparisonSpec, choice: TaskChoice, storage: str, like: TaskChoice | None = None) -> TaskData:
    """Read a task's rows and put its training files into the storage. Raises DataError if they cannot be had.

    `like` is the same task in other words, whose rows these are to be: which ones are taken depends on the words.
    """
    task, folder = get_task(choice.task, choice.wording, choice.shots), spec.data_of(choice)
    train, validation = _training_rows(task, folder, choice)
    if like is not None and like.wording != choice.wording:
        chosen = _training_rows(get_task(like.task, like.wording, like.shots), folder, like)
        held = "validation" if "validation" in task.splits(folder) else "train"
        train = _with_ids(list(task.rows("train", folder)), chosen[0])
        validation = _with_ids(list(task.rows(held, folder)), chosen[1])
    files = (_stored(task, train, storage), _stored(task, validation, storage))
    chats = None
    if spec.chat_template and task.as_chat and any(map(has_chat_template, spec.backbones)):
        chats = (_stored(task, train, storage, chat=True), _stored(task, validation, storage, chat=True))
    asked = zip(choice.evaluations, (like or choice).evaluations, strict=True)
    tests = tuple(_test_set(spec, other, plain) for other, plain in asked)
    general = _general(spec)
    parts: list[object] = [
        *(Path(file).name for file in files),
        [_plain(test) for test in tests],
    ]  # stored under their own digests
    parts += [_plain(general)] if general else []
    digest = hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()
    return TaskData(task, files, chats, tuple(train), tuple(validation), tests, digest, general)


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


def _with_ids(rows: list[TaskRow], chosen: Sequence[TaskRow]) -> list[TaskRow]:
    """Those that are `chosen` in other words."""
    ids = {row.id for row in chosen}
    return [row for row in rows if row.id in ids]


def _test_set(spec: ComparisonSpec, choice: Evaluation, like: Evaluation) -> TestSet:
    task = get_task(choice.task, choice.wording, choice.shots)
    place = spec.data_of(choice)
    rows = tuple(task.rows("test", place, choice.test_rows))
    if like.wording != choice.wording:
        plain = get_task(like.task, like.wording, like.shots)
        rows = tuple(_with_ids(list(task.rows("test", place)), list(plain.rows("test", place, like.test_rows))))
    if not rows:
        raise DataError(f"{task.name}: there are no test rows to score on; look at its files", param="data")
    return TestSet(task, rows)


def _general(spec: ComparisonSpec) -> TestSet | None:
    asked = spec.forgetting
    if asked is None or asked.task is None:
        return None
    return _test_set(spec, *[Evaluation(task=asked.task, test_rows=asked.rows, data=asked.data)] * 2)


def _stored(task: Task, rows: Sequence[TaskRow], storage: str, chat: bool = False) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{task.name}.jsonl"
        lines = (json.dumps(task.line(row, chat), ensure_ascii=False) for row in rows)
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
    rows = [
        [row.prompt, row.input, row.completion, row.references, row.group, *([row.system] if row.system else [])]
        for row in test.rows
    ]
    return [test.task.name, test.task.stored_wording, test.task.shots, rows]
