"""A checked file becomes token rows on disk, split by prompt.

Rows are written once to an Arrow file under `cache_dir`, keyed by everything they depend on, and memory-mapped from
there: files of gigabytes never sit in memory. The cache entry is built in a directory of its own and renamed, so
nothing half-written is ever read and any number of processes may load the same file at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.data.example_text import prompt_and_answer
from pedro.data.lines import bad_lines, data_digest, empty_file, kind, scan
from pedro.data.mistakes import LineError
from pedro.data.prompt_format import PromptFormat, encode_completions, encode_prompts
from pedro.errors import DataError
from pedro.stored_files import touch

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from pedro.data.conditioning import Heads
    from pedro.data.row_shapes import Example, Fields
    from pedro.model_protocols import Tokenizer

__all__ = ["RowCounts", "Splits", "collate", "data_digest", "load_rows", "row_counts", "split"]

LOG = logging.getLogger(__name__)
ROWS_VERSION = 5  # raise it when the rows of one file change: old cache entries are then left alone
BATCH = 1000
TELL_EVERY_S = 10.0
STALE_S = 24 * 3600
SOURCE = "source.txt"  # the digest of the file that the rows are of; entries of earlier releases have none
REJECTED = "rejected_ids"
IGNORED_LABEL = -100  # torch's cross_entropy skips it


@dataclass(frozen=True)
class RowCounts:
    """What became of a file's examples. Rows that were cut short or left out are never silent."""

    examples: int
    rows: int
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Splits:
    """Parts of one dataset; equal prompts are in the same part."""

    train: Dataset
    theta: Dataset
    validation: Dataset


def load_rows(
    path: Path | str,
    tokenizer: Tokenizer,
    format: PromptFormat,
    max_length: int,
    cache_dir: Path | str,
    fields: Fields | None = None,
    tell: Callable[[str], None] = lambda _text: None,
) -> Dataset:
    """The file's rows, in its order, memory-mapped. `fields` names its columns where they are not ours; `tell` hears
    now and then how far a long file is.

    Columns: `input_ids` (prompt + completion, at most `max_length`), `prompt_len`, `split_hash` (float in [0, 1),
    a function of the prompt text alone), `completion` (text), `line`; of preferences also `rejected_ids`
    (the same prompt + the worse answer, cut like the better one). A row that is too long loses the end of its
    completion; one whose prompt leaves no room for a token of it is dropped. Both are counted (`row_counts`) and
    logged; a prompt is never cut. Raises DataError for bad lines, an empty file, or if nothing fits.
    """
    from datasets import Dataset

    path = Path(path)
    read_as = [kind(path, fields), dict(fields or {})]
    digest = data_digest(path)
    key = _key(digest, tokenizer, format, max_length, read_as)
    entry = Path(cache_dir) / f"rows-{key}"
    if not (entry / "counts.json").is_file():
        _build(entry, path, digest, fields, _Writer(tokenizer, format, max_length), tell)
    touch(entry)  # so that it is not taken for one that nobody uses
    dataset = Dataset.from_file(str(entry / "rows.arrow"))
    counts = row_counts(dataset)
    if counts.truncated or counts.dropped:
        LOG.warning(
            "%s: at %d tokens, %d of %d answers are cut short and %d examples left out",
            path, max_length, counts.truncated, counts.examples, counts.dropped,
        )  # fmt: skip
    return dataset


def row_counts(dataset: Dataset) -> RowCounts:
    """How many examples the file behind `dataset` had, and what became of them."""
    assert dataset.cache_files, "row_counts: give a dataset that load_rows made"
    sidecar = Path(dataset.cache_files[0]["filename"]).with_name("counts.json")
    return RowCounts(**json.loads(sidecar.read_text()))


def split(dataset: Dataset, theta: float = 0.1, validation: float = 0.1) -> Splits:
    """Cuts rows by `split_hash`: validation is [0, v), theta [v, v + t), train the rest.

    A share of 0 gives an empty part. Raises DataError when a share is not in [0, 1), they leave nothing to train
    on, or a share above 0 catches no row.
    """
    import numpy as np

    for name, share in (("theta", theta), ("validation", validation)):
        if not 0 <= share < 1:
            raise DataError(f"data.{name}: expected a share in [0, 1), got {share}", param=f"data.{name}")
    if theta + validation >= 1:
        total = theta + validation
        raise DataError(f"data: theta + validation = {total:g} leaves nothing to train on", param="data.theta")
    column = dataset.with_format("numpy", columns=["split_hash"])[:]["split_hash"]
    hashes = np.asarray(column, dtype=np.float64)
    parts = {
        "validation": hashes < validation,
        "theta": (hashes >= validation) & (hashes < validation + theta),
        "train": hashes >= validation + theta,
    }
    shares = {"validation": validation, "theta": theta, "train": 1.0}
    for name, mask in parts.items():
        if shares[name] > 0 and not mask.any():
            raise DataError(
                f"data.{name}: its share of {len(hashes)} rows holds none (rows are dealt by a hash of their prompt); "
                "bring more rows with different prompts, change the shares, or give a file",
                param=f"data.{name}",
            )
    return Splits(**{name: dataset.select(np.flatnonzero(mask)) for name, mask in parts.items()})


def collate(rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]], pad_id: int) -> dict[str, list[Any]]:
    """Rows of one batch, padded on the right to B × T lists: `input_ids`, `attention_mask`, `labels` (-100 on prompt
    and padding), and `prompt_lens` (B). Takes rows, or the columns that slicing a `Dataset` gives.
    """
    if isinstance(rows, Mapping):
        pairs = list(zip(rows["input_ids"], rows["prompt_len"], strict=True))
    else:
        pairs = [(row["input_ids"], row["prompt_len"]) for row in rows]
    width = max(len(ids) for ids, _ in pairs)
    batch: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "prompt_lens": []}
    for ids, prompt_len in pairs:
        row, pad = list(ids), width - len(ids)
        batch["input_ids"].append(row + [pad_id] * pad)
        batch["attention_mask"].append([1] * len(row) + [0] * pad)
        batch["labels"].append([IGNORED_LABEL] * prompt_len + row[prompt_len:] + [IGNORED_LABEL] * pad)
        batch["prompt_lens"].append(prompt_len)
    return batch


def _key(digest: str, tokenizer: Tokenizer, format_: PromptFormat, max_length: int, read_as: list[Any]) -> str:
    """Of everything that the rows depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, type(tokenizer).__name__]
    parts = [ROWS_VERSION, digest, vocabulary, special, format_.to_dict(), max_length, read_as]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _build(
    entry: Path, path: Path, digest: str, fields: Fields | None, written: _Writer, tell: Callable[[str], None]
) -> None:
    """Writes the cache entry beside its place and renames it there; if another process was first, its entry stands."""
    from datasets.arrow_writer import ArrowWriter

    entry.parent.mkdir(parents=True, exist_ok=True)
    _sweep(entry.parent)
    building = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        (building / SOURCE).write_text(digest)  # first: it tells whose rows these will be
        batches = written.batches(path, fields)
        first, told = next(batches, {}), time.monotonic()
        with ArrowWriter(path=str(building / "rows.arrow"), features=_features(REJECTED in first)) as writer:
            for columns in chain([first] if first else [], batches):
                writer.write_batch(columns)
                if time.monotonic() - told >= TELL_EVERY_S:
                    tell(f"{written.examples:,} examples tokenised")
                    told = time.monotonic()
            writer.finalize()
        counts = written.counts()
        if not counts.examples:
            raise empty_file(path)
        if not counts.rows:
            raise DataError(
                f"data: no prompt of {str(path)!r} fits into max_length {written.max_length}; raise it or shorten the "
                "prompts",
                param="training.max_length",
            )
        (building / "counts.json").write_text(json.dumps(asdict(counts)))
        try:
            building.rename(entry)
        except OSError:
            if not (entry / "counts.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Removes what killed processes left half-built, a day later."""
    for left in cache.glob(".rows-*"):
        try:
            stale = time.time() - left.stat().st_mtime > STALE_S
        except FileNotFoundError:  # another process finished or swept it
            continue
        if stale:
            shutil.rmtree(left, ignore_errors=True)


class _Writer:
    """Turns a file into batches of columns and counts what it does."""

    def __init__(self, tokenizer: Tokenizer, format_: PromptFormat, max_length: int) -> None:
        self.tokenizer, self.format, self.max_length = tokenizer, format_, max_length
        self.examples = self.rows = self.truncated = 0
        self.heads: Heads | None = None
        if format_.head_end:
            from pedro.data import conditioning

            self.heads = conditioning.Heads(format_, tokenizer)

    def batches(self, path: Path, fields: Fields | None) -> Iterator[dict[str, list[Any]]]:
        examples = self._examples(path, fields)
        while batch := list(islice(examples, BATCH)):
            columns = self._columns(batch, path)
            self.examples += len(batch)
            self.rows += len(columns["line"])
            if columns["line"]:
                yield columns

    def counts(self) -> RowCounts:
        return RowCounts(self.examples, self.rows, self.truncated, self.examples - self.rows)

    def _examples(self, path: Path, fields: Fields | None) -> Iterator[tuple[Example, str, list[str]]]:
        """Each example with its prompt and answer, and the worse answer where it has one.

        Bad lines are collected to the end, then raised together.
        """
        errors: list[LineError] = []
        count = 0
        for item in scan(path, fields):
            if isinstance(item, LineError):
                count += 1
                errors += [item][: max(0, 5 - len(errors))]
                continue
            if count:
                continue  # nothing will be kept: only count the rest
            for example in item.examples:
                try:
                    prompt, answer = prompt_and_answer(self.format, example, self.tokenizer)
                    worse = (
                        [prompt_and_answer(self.format, example.rejected, self.tokenizer)[1]]
                        if example.rejected
                        else []
                    )
                    yield example, prompt, [answer, *worse]
                except DataError as error:
                    raise bad_lines(path, [LineError(example.line, "messages", error.message)], 1) from None
        if count:
            raise bad_lines(path, errors, count)

    def _columns(self, batch: list[tuple[Example, str, list[str]]], path: Path) -> dict[str, list[Any]]:
        prompts = encode_prompts(self.tokenizer, [prompt for _, prompt, _ in batch])
        if self.heads is not None:
            for (example, *_), ids in zip(batch, prompts, strict=True):
                try:
                    self.heads.check(example.messages, example.tools, ids)
                except DataError as error:
                    reason = error.message.removeprefix("messages: ")
                    raise bad_lines(path, [LineError(example.line, "messages", reason)], 1) from None
        sides = [self._encoded([answers[side] for *_, answers in batch]) for side in range(len(batch[0][2]))]
        columns: dict[str, list[Any]] = {name: [] for name in _features(len(sides) > 1)}
        for (example, prompt, answers), before, *afters in zip(batch, prompts, *sides, strict=True):
            if len(before) >= self.max_length:
                continue
            rows = [[*before, *after] for after in afters]
            self.truncated += any(len(ids) > self.max_length for ids in rows)
            for name, ids in zip(("input_ids", REJECTED), rows, strict=False):  # a file has one answer a row, or two
                columns[name].append(ids[: self.max_length])
            columns["prompt_len"].append(len(before))
            columns["split_hash"].append(_split_hash(prompt))
            columns["completion"].append(str(answers[0]))
            columns["line"].append(example.line)
        return columns

    def _encoded(self, answers: list[str]) -> list[list[int]]:
        return encode_completions(self.tokenizer, answers, self.format.special_tokens_in_content)


def _split_hash(prompt: str) -> float:
    """The first 53 bits of a keyed hash of the prompt as a fraction: exact in a float, the same on every machine.

    Keyed, because a file whose rows somebody picked by a plain sha256 would be cut into very unequal shares.
    """
    digest = hashlib.blake2b(prompt.encode(), digest_size=8, key=b"pedro split").digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _features(pairs: bool) -> Features:
    from datasets import Features, List, Value

    return Features(
        {
            **({REJECTED: List(Value("int32"))} if pairs else {}),
            "input_ids": List(Value("int32")),
            "prompt_len": Value("int32"),
            "split_hash": Value("float64"),
            "completion": Value("string"),
            "line": Value("int64"),
        }
    )
