"""Where records come from: files in a known layout, or the Hugging Face hub.

Files are read as they are asked for, compressed or not; a record is a dict in the form that the hub gives it, with
class labels by name.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pedro.errors import DataError

if TYPE_CHECKING:
    from pedro.data.tasks.task import Task

Record = dict[str, Any]
CHUNK = 1 << 16
HUB = "hub"
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, EOFError, OSError, csv.Error)


@dataclass(frozen=True)
class Part:
    """A split: files (glob patterns), of them the records whose field `only[0]` is `only[1]`, and of those the share
    [low, high) by a hash of the task's `cut_by`."""

    files: tuple[str, ...]
    only: tuple[str, str] | None = None
    low: float = 0.0
    high: float = 1.0


Layout = Mapping[str, Part]


@dataclass(frozen=True)
class HubSource:
    """A dataset of the hub: our splits by its names, its configurations, and how many rows it publishes."""

    path: str
    splits: Mapping[str, str]
    configs: tuple[str | None, ...] = (None,)
    revision: str | None = None
    rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Records by split. `name` is a path or a hub id, for messages."""

    name: str
    splits: Mapping[str, Part]
    _read: Callable[[str], Iterator[Record]]

    def part(self, split: str) -> Part:
        """Raises DataError that names the splits there are."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DataError(f"split: {self.name} has no {split!r}; choose one of: {known}", param="split")
        return self.splits[split]

    def records(self, split: str) -> Iterator[Record]:
        """The records of a split, before it is cut by shares."""
        self.part(split)
        return self._read(split)


def open_source(task: Task, data: str | Path | None) -> Source:
    """The task's data under a directory, on the hub ("hub"), or in the package (None). Raises DataError."""
    if data == HUB:
        return _hub(task)
    if data is None:
        if task.packaged is None:
            raise DataError(f"{task.name}: no data given; {_remedy(task)}", param="data")
        return _local(task, [task.packaged])
    root = Path(data).expanduser()
    return _local(task, [root / (task.folder or task.name), root])


def read_text(path: Path, newline: str | None = None) -> IO[str]:
    """The file as UTF-8 text, unpacked if it ends in .gz or .bz2. Raises DataError if it cannot be opened."""
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    try:
        stream: IO[str] = opener(path, "rt", encoding="utf-8", newline=newline)  # type: ignore[operator]
        return stream
    except OSError as error:
        raise DataError(f"data: {str(path)!r} cannot be read: {error.strerror or error}", param="data") from None


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line. Raises DataError that names the line."""
    with read_text(path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"line {number} is not JSON: {error.msg} at column {error.colno}"
                raise DataError(f"data: {str(path)!r}: {reason}", param="data") from None


def read_tsv(path: Path) -> Iterator[Record]:
    """Tab-separated with a header, quotes meaning nothing, as GLUE has it."""
    with read_text(path) as stream:
        yield from csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_csv(path: Path, fields: tuple[str, ...] | None = None) -> Iterator[Record]:
    """Comma-separated; `fields` where there is no header."""
    with read_text(path, newline="") as stream:
        yield from csv.DictReader(stream, fieldnames=fields)


def read_array(path: Path, key: str | None = None) -> Iterator[Any]:
    """The items of a JSON array, or of the array under `key` of an object, one at a time. Raises DataError."""
    decoder = json.JSONDecoder()
    with read_text(path) as stream:
        text, at = _to_array(stream, key, path)
        while True:
            while at < len(text) and text[at] in " \t\r\n,":
                at += 1
            if at < len(text) and text[at] == "]":
                return
            try:
                item, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                more = stream.read(max(CHUNK, len(text) - at))  # an item that does not fit doubles what is read
                if not more:
                    reason = "ends within its array, or is not JSON"
                    raise DataError(f"data: {str(path)!r} {reason}; fetch it again", param="data") from None
                text, at = text[at:] + more, 0
                continue
            yield item
            at = end


def _to_array(stream: IO[str], key: str | None, path: Path) -> tuple[str, int]:
    """What has been read so far, and where the first item is in it."""
    text = ""
    while more := stream.read(CHUNK):
        text += more
        start = text.find(f'"{key}"') if key else 0
        at = text.find("[", start) if start >= 0 else -1
        if at >= 0:
            return text, at + 1
    what = f"array {key!r}" if key else "array"
    raise DataError(f"data: {str(path)!r} holds no JSON {what}", param="data")


def _local(task: Task, roots: list[Path]) -> Source:
    for root in roots:
        for layout in task.layouts:
            if root.is_dir() and all(_files(root, part) for part in layout.values()):
                return Source(str(root), layout, _file_reader(task, root, layout))
    wanted = " or ".join(", ".join(_patterns(layout)) for layout in task.layouts)
    raise DataError(f"{task.name}: {str(roots[0])!r} does not hold {wanted}; {_remedy(task)}", param="data")


def _file_reader(task: Task, root: Path, layout: Layout) -> Callable[[str], Iterator[Record]]:
    def read(split: str) -> Iterator[Record]:
        part = layout[split]
        for path in _files(root, part):
            try:
                for record in task.read(path):
                    if part.only is None or record.get(part.only[0]) == part.only[1]:
                        yield record
            except MALFORMED as error:
                raise DataError(
                    f"{task.name}: {str(path)!r} is not in the form of {task.source}: {error!r}", param="data"
                ) from None

    return read


def _files(root: Path, part: Part) -> list[Path]:
    """The files of a part, sorted; nothing if one of its patterns has none."""
    by_pattern = [sorted(root.glob(pattern)) for pattern in part.files]
    return [path for paths in by_pattern for path in paths] if all(by_pattern) else []


def _patterns(layout: Layout) -> list[str]:
    return list(dict.fromkeys(name for part in layout.values() for name in part.files))


def _remedy(task: Task) -> str:
    where = f"give the directory that holds {task.folder or task.name}/ (from {task.source})"
    return f'{where}, or "hub" for {task.hub.path} of the Hugging Face hub' if task.hub else where


def _hub(task: Task) -> Source:
    hub = task.hub
    if hub is None:
        raise DataError(f"{task.name}: is not on the hub; {_remedy(task)}", param="data")
    return Source(hub.path, {name: Part(()) for name in hub.splits}, lambda split: _stream(hub, split))


def _stream(hub: HubSource, split: str) -> Iterator[Record]:
    """The hub's records, streamed, class labels by name; several configurations one after another, as `group`."""
    from datasets import load_dataset

    for config in hub.configs:
        try:
            stream = load_dataset(hub.path, config, split=hub.splits[split], streaming=True, revision=hub.revision)
            names = _class_names(stream)
            records = iter(stream)
            first = next(records, None)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"data: {hub.path} cannot be streamed from the hub: {reason}; give a directory with its files",
                param="data",
            ) from error
        for record in [] if first is None else chain([first], records):
            named = dict(record)
            for column, classes in names.items():
                named[column] = classes[named[column]] if named[column] >= 0 else ""
            if len(hub.configs) > 1:
                named["group"] = config
            yield named


def _class_names(stream: Any) -> dict[str, list[str]]:
    features = stream.features or {}
    return {column: kind.names for column, kind in features.items() if hasattr(kind, "names")}
