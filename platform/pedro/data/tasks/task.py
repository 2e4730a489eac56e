"""What a benchmark task is: its wording, its answers, where its rows come from.

A row of a source (a record) becomes a `TaskRow`: the prompt, what training teaches as its answer, and every answer
that counts as right. `Task.write` puts rows into JSONL that `load_rows` and `pedro submit` read.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pedro.data.row_shapes import RowShape
from pedro.data.tasks.sources import HubSource, Layout, Part, Record, Source, open_source
from pedro.errors import ConfigError, DataError


@dataclass(frozen=True)
class TaskRow:
    """One question. `prompt` conditions the answer, `completion` is what training teaches.

    `references` are all the answers that count as right, in the form that the task's parser gives (the completion
    if there are none). `input` is Alpaca's second field; `system` a turn in front of the prompt; `group` is the subject
    or sub-task; `extra` is what a metric needs besides.
    """

    prompt: str
    completion: str
    references: tuple[str, ...] = ()
    input: str = ""
    group: str = ""
    id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The answers that count as right; never empty."""
        return self.references or (self.completion,)

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """What `PromptFormat.render` takes, so that a row can be asked in the format of any adapter."""
        if self.input.strip():
            return ({"role": "system", "content": self.prompt}, {"role": "user", "content": self.input})
        told = ({"role": "system", "content": self.system},) if self.system else ()
        return (*told, {"role": "user", "content": self.prompt})


@dataclass(frozen=True)
class Wording:
    """How a record is put into words: `str.format` templates over its fields.

    A prompt is `head`, then worked examples if any are asked for, then `body`. `labels` are the words for the
    source's classes. `reasons` says that answers spell out their reasoning, `spelled` that an answer is a choice's own
    words and not its letter, so that the likeliest for each character is taken. `instruction` is what a model that was
    not trained on the task is told before the prompt, where the prompt itself does not say what is asked. `system` is a
    turn of its own in front of every prompt, trained models' too.
    """

    body: str
    labels: Mapping[str, str] = field(default_factory=dict)
    head: str = ""
    reasons: bool = False
    spelled: bool = False
    instruction: str = ""
    system: str = ""

    @property
    def ending(self) -> str:
        """What every prompt ends with, whatever the record says; "" where it ends with the record's own words."""
        literal, name, *_ = list(Formatter().parse(self.body))[-1]
        return literal if name is None else ""

    def prompt(self, fields: Mapping[str, Any], shots: str = "") -> str:
        """The prompt, up to where the answer begins."""
        return self.head.format_map(fields) + shots + self.body.format_map(fields)

    def told(self, fields: Mapping[str, Any]) -> str:
        """The system turn; "" where there is none."""
        return self.system.format_map(fields)

    def label(self, name: str) -> str:
        """The word for a class of the source. Raises DataError for a class that the task does not have."""
        try:
            return self.labels[name]
        except KeyError:
            known = ", ".join(self.labels)
            raise DataError(f"label: {name!r} is not a class of this task; expected one of {known}") from None


TEMPLATE, BARE = "template", "bare"
SECOND_NAMES = {TEMPLATE: "full", BARE: "short"}
"""Names of wordings that a task knows under another one, unless it says so itself: what results and their ids hold."""
Make = Callable[[Record, Wording, str], TaskRow | None]
"""(record, wording, worked examples) -> its row, or None for a record that the task leaves out."""
Parse = Callable[[str, TaskRow, Wording], str]
"""(generated text, row, wording) -> the answer in it; "" if there is none."""


@dataclass(frozen=True)
class Task:
    """A benchmark. `metric` names one of `pedro.evaluation.metrics`; `average` says over what it is taken.

    Every task has the wording `template`, whose prompts end with the same words whatever the record says; `bare` is the
    record's text with nothing around it. Both may be `second_names` of wordings that are called otherwise. In `system`,
    where a task has it, what does not change from question to question stands in a system turn.

    `layouts` are the file trees that are known, the most specific first, under `folder` of a data directory (the name
    if not given); `read` turns one of their files into records of the hub's form. `packaged` is a folder of the
    package with data of its own. `cut_by` is the field by which one file is cut into several splits; records that
    share its value stay together.
    """

    name: str
    title: str
    metric: str
    licence: str
    source: str
    wordings: Mapping[str, Wording]
    make: Make
    parser: Parse
    read: Callable[[Path], Iterable[Record]]
    layouts: tuple[Layout, ...]
    folder: str = ""
    hub: HubSource | None = None
    packaged: Path | None = None
    cut_by: str = ""
    shape: RowShape = RowShape.COMPLETION
    max_new_tokens: int = 16
    stops: tuple[str, ...] = ()
    shots_from: str = "train"
    average: Literal["rows", "groups"] = "rows"
    wording: str = TEMPLATE
    shots: int = 0
    second_names: Mapping[str, str] = field(default_factory=lambda: SECOND_NAMES)

    def configured(self, wording: str = TEMPLATE, shots: int = 0) -> Task:
        """The same task in other words or with worked examples. Raises ConfigError for what it does not have."""
        if wording not in self.wording_names:
            known = ", ".join(self.wording_names)
            raise ConfigError(f"wording: {self.name} has no {wording!r}; choose one of: {known}", param="wording")
        if shots < 0:
            raise ConfigError(f"shots: expected 0 or more, got {shots}", param="shots")
        made = replace(self, wording=wording, shots=shots)
        if shots and made.words.system:
            raise ConfigError(f"shots: {self.name} has none in the wording {wording!r}; set 0", param="shots")
        return made

    @property
    def wording_names(self) -> list[str]:
        """Every name that `configured` takes."""
        second = [name for name, first in self.second_names.items() if first in self.wordings]
        return list(dict.fromkeys([*second, *self.wordings]))

    @property
    def stored_wording(self) -> str:
        """The wording's first name, which results and their ids hold."""
        return self.wording if self.wording in self.wordings else self.second_names[self.wording]

    @property
    def words(self) -> Wording:
        return self.wordings[self.stored_wording]

    @property
    def as_chat(self) -> bool:
        """Whether its rows are conversations where the backbone has a chat template."""
        return (self.wording == TEMPLATE or bool(self.words.system)) and self.shape is RowShape.COMPLETION

    def open(self, data: str | Path | None = None) -> Source:
        """Where the rows are: a directory, "hub", or None for data that the package carries. Raises DataError."""
        return open_source(self, data)

    def splits(self, data: str | Path | None = None) -> tuple[str, ...]:
        """The parts that `data` has (train, validation, test). Raises DataError if it has none."""
        return tuple(name for name in self.open(data).splits if name != "shots")

    def rows(self, split: str, data: str | Path | None = None, limit: int | None = None) -> Iterator[TaskRow]:
        """The rows of a split, read as they are needed, in the source's order.

        With `limit`, a fair sample of that size: those with the smallest hashes, in the source's order. Raises
        DataError if the data or the split is missing, or a record cannot be read.
        """
        source = self.open(data)
        source.part(split)
        rows = self._rows(source, split)
        if limit is None:
            return rows
        numbered = ((_share(row.prompt + row.input, b"pedro limit"), index, row) for index, row in enumerate(rows))
        kept = heapq.nsmallest(limit, numbered, key=lambda item: item[:2])
        return iter([row for _, _, row in sorted(kept, key=lambda item: item[1])])

    def parse(self, text: str, row: TaskRow) -> str:
        """The answer in a generated text, comparable with `row.accepted`; "" if it holds none."""
        for stop in self.stops:
            before, _, _ = text.partition(stop)
            text = before if before.strip() else text
        return self.parser(text, row, self.words)

    def line(self, row: TaskRow, chat: bool = False) -> dict[str, Any]:
        """The row as a line of a training file; as a conversation if that is asked for."""
        if chat:
            return {"messages": [*row.messages, {"role": "assistant", "content": row.completion}]}
        if self.shape is RowShape.ALPACA:
            return {"instruction": row.prompt, "input": row.input, "output": row.completion}
        return {"prompt": "\n".join(turn["content"] for turn in row.messages), "completion": row.completion}

    def write(self, split: str, path: Path, data: str | Path | None = None, limit: int | None = None) -> int:
        """Writes a split as JSONL for training, whole or not at all; how many rows it has. Line n is the n-th row."""
        rows = self.rows(split, data, limit)
        path.parent.mkdir(parents=True, exist_ok=True)
        making, count = path.with_name(f".{path.name}.new"), 0
        try:
            with making.open("w", encoding="utf-8") as stream:
                for row in rows:
                    stream.write(json.dumps(self.line(row), ensure_ascii=False) + "\n")
                    count += 1
            making.replace(path)
        finally:
            making.unlink(missing_ok=True)
        return count

    def _rows(self, source: Source, split: str) -> Iterator[TaskRow]:
        part = source.part(split)
        shots = self._shots(source) if self.shots else {}
        for number, record in enumerate(source.records(split)):
            try:
                row = self._row(record, part, shots)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise DataError(
                    f"{self.name}: record {number + 1} of {split} in {source.name} lacks or garbles {error}; "
                    f"compare it with {self.source}",
                    param="data",
                ) from None
            if row is not None:
                yield row if row.id else replace(row, id=f"{split}-{number}")

    def _row(self, record: Record, part: Part, shots: Mapping[str, str]) -> TaskRow | None:
        """The record's row with its group's worked examples; None if it is of another share or left out."""
        cut = self.cut_by and (part.low, part.high) != (0.0, 1.0)
        if cut and not part.low <= _share(str(record[self.cut_by]), b"pedro task") < part.high:
            return None
        row = self.make(record, self.words, "")
        if row is None or not self.shots:
            return row
        if row.group not in shots:
            raise ConfigError(f"shots: {self.name} has no worked examples for {row.group!r}; set 0", param="shots")
        return self.make(record, self.words, shots[row.group])

    def _shots(self, source: Source) -> dict[str, str]:
        """The first `shots` worked examples of each group, as text."""
        split = "shots" if "shots" in source.splits else self.shots_from
        if split not in source.splits:
            raise ConfigError(f"shots: {self.name} has no worked examples in {source.name}; set 0", param="shots")
        plain = replace(self.words, head="")
        texts: dict[str, list[str]] = defaultdict(list)
        for record in source.records(split):
            row = self.make(record, plain, "")
            if row is None:
                continue
            examples = texts[row.group]
            if len(examples) < self.shots:
                examples.append(f"{row.prompt} {row.completion}\n\n")
            if not row.group and len(examples) == self.shots:
                break  # one group, and it is full
        short = [group or self.name for group, examples in texts.items() if len(examples) < self.shots]
        if short or not texts:
            named = ", ".join(map(repr, short[:3]))
            raise ConfigError(f"shots: fewer than {self.shots} worked examples of {named}", param="shots")
        return {group: "".join(examples) for group, examples in texts.items()}


def proportional(rows: Iterable[TaskRow], count: int) -> list[TaskRow]:
    """A fair sample in which every group (subject, sub-task) has its share, in the source's order.

    A smaller sample is part of every larger one.
    """
    numbered = list(enumerate(rows))
    groups: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for index, row in numbered:
        groups[row.group].append((_share(row.prompt + row.input, b"pedro proportional"), index))
    places = sorted(
        ((rank + 0.5) / len(found), share, index)
        for found in groups.values()
        for rank, (share, index) in enumerate(sorted(found))
    )
    kept = {index for _, _, index in places[:count]}
    return [row for index, row in numbered if index in kept]


def _share(text: str, key: bytes) -> float:
    """A fraction from a hash. Its key differs from that of `split`, so cuts by one leave the other's shares fair."""
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()) >> 11) / 2**53
