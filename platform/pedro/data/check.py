"""Checks whether a tenant's file can be trained on, and reports what is odd about it.

One pass over the file, line by line. What grows with the file is 24 bytes an example (two hashes and two lengths),
so gigabytes can be checked on a laptop.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.data.example_text import outline, prompt_and_answer
from pedro.data.files import Kind
from pedro.data.lines import data_digest, kind, scan
from pedro.data.mistakes import LineError, escaped
from pedro.data.prompt_format import PromptFormat, encode_completions, encode_prompts, format_for_shape
from pedro.errors import DataError

if TYPE_CHECKING:
    from pedro.data.row_shapes import Example, Fields, ParsedLine, RowShape
    from pedro.model_protocols import Tokenizer

Texts = tuple[str, str, str | None]
"""A prompt, its answer, and the worse answer where the row is a preference."""
MAX_ERRORS = 100
SHOWN_ERRORS = 10
MOST_ANSWERS = 5
MAX_ANSWERS = 1000  # different ones that are counted, of at most this many characters: labels, not essays
ANSWER_LENGTH = 100
GOOD_ROW = '{"prompt": "The film was a delight.", "completion": "positive"}'
MAX_IGNORED = 20
BATCH = 1000


@dataclass(frozen=True)
class Lengths:
    """Of one column, in tokens."""

    min: int
    median: int
    p95: int
    max: int
    total: int


@dataclass(frozen=True)
class DataReport:
    """What a check found. `usable` says whether the file may be trained on; the rest is for the reader to weigh.

    `truncated` answers lose their end to fit `max_length`, `dropped` examples have prompts that leave no room for
    one answer token (both None without a tokenizer and a length). `rejected_tokens` are those of the worse answers in a
    file of preferences; all else said of answers is of the better ones. `duplicates` repeat an earlier prompt and
    answer; `leaked` have a prompt that the validation file has too. `ignored` counts what is in the lines but not
    learnt from, `answers` are the commonest ones (of the first 1,000 different short ones) with their counts, and
    `numbers` counts answers that were integers and are learnt as their digits. Of `error_count` bad lines, the first
    100 are in `errors`.
    """

    path: str
    digest: str
    shape: str | None
    format: str | None
    rows: int
    examples: int
    prompt_tokens: Lengths | None
    completion_tokens: Lengths | None
    max_length: int | None
    truncated: int | None
    dropped: int | None
    duplicates: int
    empty_answers: int
    leaked: int | None
    validation_examples: int | None
    validation_errors: int | None
    ignored: dict[str, int]
    answers: tuple[tuple[str, int], ...]
    numbers: int
    kind: str
    errors: tuple[dict[str, Any], ...]
    error_count: int
    number_field: str | None = None
    rejected_tokens: Lengths | None = None

    @property
    def usable(self) -> bool:
        """Every line is good and at least one example can be trained on."""
        return self.error_count == 0 and self.examples - (self.dropped or 0) > 0

    def to_dict(self) -> dict[str, Any]:
        return {"usable": self.usable, **asdict(self)}

    def text(self) -> str:
        """The report as lines for a terminal."""
        unit = Kind(self.kind).unit
        lines = [f"{escaped(self.path)}: {'usable' if self.usable else 'NOT usable'}"]
        shape = f"{self.shape or 'unknown'}, prompt format {self.format or 'unknown'}, read as {self.kind}"
        lines.append(f"  shape       {shape}")
        lines.append(f"  rows        {self.rows:,} {unit}s, {self.examples:,} examples")
        measured = {"prompt": self.prompt_tokens, "answer": self.completion_tokens, "rejected": self.rejected_tokens}
        for name, lengths in measured.items():
            if lengths:
                spread = f"min {lengths.min}, median {lengths.median}, 95 % {lengths.p95}, max {lengths.max}"
                lines.append(f"  {name:11} tokens: {spread}; {lengths.total:,} in all")
        if self.max_length is not None and self.truncated is not None:
            cut = f"{self.truncated:,} answers truncated, {self.dropped:,} examples dropped"
            lines.append(f"  length      {cut} at {self.max_length} tokens")
        if self.answers:
            commonest = ", ".join(f"{text[:40]!r} {count:,}×" for text, count in self.answers)
            lines.append(f"  answers     commonest: {commonest}")
        if self.numbers:
            lines.append(f"  numbers     {self.numbers_said()}")
        lines.append(f"  duplicates  {self.duplicates:,}")
        lines.append(f"  empty       {self.empty_answers:,} answers are blank")
        if self.leaked is not None:
            lines.append(f"  leakage     {self.leaked:,} prompts are in the validation file too")
        if self.validation_errors:
            lines.append(f"  validation  {self.validation_errors:,} bad lines; check that file as well")
        if not self.examples and not self.error_count:
            lines.append("  error       no examples in the file; put one JSON object on each line")
        lines += [f"  ignored     {name}: {count:,}" for name, count in self.ignored.items()]
        lines += [
            f"  error       {unit} {e['line']}: {escaped(e['field'])}: {escaped(e['reason'])}"
            for e in self.errors[:SHOWN_ERRORS]
        ]
        if self.error_count > SHOWN_ERRORS:
            more = f"and {self.error_count - SHOWN_ERRORS:,} more bad {unit}s"
            lines.append(f"  error       {more}; --json holds the first {MAX_ERRORS}")
        if not self.examples:
            lines.append(f"  a good row  {GOOD_ROW}")
        return "\n".join(lines)

    def numbers_said(self) -> str:
        """How many answers were integers, and the command that makes text of them."""
        fix = f"`jq -c '.{self.number_field} |= tostring' FILE > NEW` writes them so"
        return f'{self.numbers:,} answers are integers, learnt as their digits ("1"); {fix}'


def check_file(
    path: Path | str,
    tokenizer: Tokenizer | None = None,
    max_length: int | None = None,
    validation: Path | str | None = None,
    format: PromptFormat | None = None,
    fields: Fields | None = None,
) -> DataReport:
    """Checks a data file. Token counts need a `tokenizer`, truncation a `max_length` as well.

    `format` is how prompts are written (the shape's own by default), `fields` names columns.
    Raises DataError only if a file cannot be opened: everything wrong inside it is in the report.
    """
    tally = _Tally(tokenizer, max_length, format)
    for batch in _batches(scan(path, fields), BATCH):
        tally.add(batch)
    validation_prompts = None
    validation_errors = None
    if validation is not None:
        other = _Tally(None, None, tally.format)
        for batch in _batches(scan(validation, fields), BATCH):
            other.add(batch)
        validation_prompts, validation_errors = other.prompts, other.error_count
    return DataReport(
        path=str(path),
        digest=data_digest(path),
        shape=tally.shape,
        format=tally.format.id if tally.format else None,
        rows=tally.rows,
        examples=len(tally.prompts),
        prompt_tokens=_lengths(tally.prompt_lengths),
        completion_tokens=_lengths(tally.completion_lengths),
        max_length=max_length,
        truncated=tally.truncated if tokenizer is not None and max_length else None,
        dropped=tally.dropped if tokenizer is not None and max_length else None,
        duplicates=_repeats(tally.pairs),
        empty_answers=tally.empty_answers,
        leaked=None if validation_prompts is None else _shared(tally.prompts, validation_prompts),
        validation_examples=None if validation_prompts is None else len(validation_prompts),
        validation_errors=validation_errors,
        ignored=dict(tally.ignored.most_common()),
        answers=tuple(tally.answers.most_common(MOST_ANSWERS)),
        numbers=tally.numbers,
        kind=kind(path, fields),
        errors=tuple(tally.errors),
        error_count=tally.error_count,
        number_field=tally.number_field,
        rejected_tokens=_lengths(tally.rejected_lengths),
    )


@dataclass
class _Tally:
    """The running totals of one file."""

    tokenizer: Tokenizer | None
    max_length: int | None
    format: PromptFormat | None
    shape: RowShape | None = None
    rows: int = 0
    truncated: int = 0
    dropped: int = 0
    empty_answers: int = 0
    error_count: int = 0
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    pairs: array[int] = field(default_factory=lambda: array("Q"))
    prompt_lengths: array[int] = field(default_factory=lambda: array("I"))
    completion_lengths: array[int] = field(default_factory=lambda: array("I"))
    rejected_lengths: array[int] = field(default_factory=lambda: array("I"))
    ignored: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    numbers: int = 0
    number_field: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    def add(self, items: list[ParsedLine | LineError]) -> None:
        texts: list[Texts] = []
        for item in items:
            self.rows += 1
            if isinstance(item, LineError):
                self._count(item)
                continue
            if self.shape is None:
                self.shape = item.shape
                self.format = self.format or format_for_shape(item.shape, self.tokenizer)
            for name in item.ignored:
                known = name in self.ignored or len(self.ignored) < MAX_IGNORED
                self.ignored[name if known else "other fields"] += 1
            if item.number_field:
                self.numbers += 1
                self.number_field = self.number_field or item.number_field
            texts += self._render(item.examples)
        for prompt, completion, worse in texts:
            self.prompts.append(_hash(prompt))
            self.pairs.append(_hash(prompt, completion, *([] if worse is None else [worse])))
            self.empty_answers += not completion.strip()
            if completion in self.answers or (
                len(self.answers) < MAX_ANSWERS and 0 < len(completion.strip()) <= ANSWER_LENGTH
            ):
                self.answers[completion] += 1
        if self.tokenizer is not None and texts:
            self._measure(self.tokenizer, texts)

    def _render(self, examples: tuple[Example, ...]) -> list[Texts]:
        try:
            return [self._texts(example) for example in examples]
        except DataError as error:
            self._count(LineError(examples[0].line, error.param or "messages", error.message))
            return []

    def _texts(self, example: Example) -> Texts:
        prompt, answer = self._prompt_and_answer(example)
        return prompt, answer, self._prompt_and_answer(example.rejected)[1] if example.rejected else None

    def _prompt_and_answer(self, example: Example) -> tuple[str, str]:
        assert self.format is not None, "a good line sets the format"
        if self.tokenizer is None:
            return outline(self.format, example)
        return prompt_and_answer(self.format, example, self.tokenizer)

    def _measure(self, tokenizer: Tokenizer, texts: list[Texts]) -> None:
        prompts = encode_prompts(tokenizer, [prompt for prompt, _, _ in texts])
        completions = encode_completions(tokenizer, [completion for _, completion, _ in texts])
        longest = [len(after) for after in completions]
        for before, after in zip(prompts, completions, strict=True):
            self.prompt_lengths.append(len(before))
            self.completion_lengths.append(len(after))
        if others := [worse for *_, worse in texts if worse is not None]:  # all of a file's rows have one, or none
            rejected = [len(ids) for ids in encode_completions(tokenizer, others)]
            self.rejected_lengths.extend(rejected)
            longest = [max(sides) for sides in zip(longest, rejected, strict=True)]
        for before, answer in zip(prompts, longest, strict=True):
            if self.max_length and len(before) + answer > self.max_length:
                fits = len(before) < self.max_length
                self.truncated += fits
                self.dropped += not fits

    def _count(self, error: LineError) -> None:
        self.error_count += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append({"line": error.line, "field": error.field, "reason": error.reason})


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _hash(*texts: str) -> int:
    """64 bits of the texts; two different ones among ten million meet with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest())


def _repeats(hashes: array[int]) -> int:
    import numpy as np

    return len(hashes) - len(np.unique(np.frombuffer(hashes, dtype=np.uint64))) if hashes else 0


def _shared(hashes: array[int], others: array[int]) -> int:
    """How many distinct hashes are in both."""
    import numpy as np

    if not hashes or not others:
        return 0
    return len(np.intersect1d(np.frombuffer(hashes, dtype=np.uint64), np.frombuffer(others, dtype=np.uint64)))


def _lengths(values: array[int]) -> Lengths | None:
    import numpy as np

    if not values:
        return None
    column = np.frombuffer(values, dtype=np.uint32)
    low, median, p95, high = (int(v) for v in np.percentile(column, [0, 50, 95, 100], method="lower"))
    return Lengths(low, median, p95, high, int(column.sum(dtype=np.uint64)))
