"""Public text that a backbone may be trained on and shipped with, and the texts that it is judged by.

Only sources whose licence allows shipping, and of them no row of a published validation or test part: benchmarks
stay unseen.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pedro.data.tasks import get_task
from pedro.data.tasks.sources import MALFORMED, read_array, read_csv
from pedro.errors import DataError

HELD_OUT_CHARS = 150_000  # of each held-out text: enough for three digits of bits a character
LEFT_OUT = (
    "SQuAD dev, MMLU validation and test, GSM8K test, WikiSQL and Advising dev and test, SNIPS validate, CLINC150 "
    "validation and test, Banking77 test, BoolQ (only a validation set is at hand), BIG-Bench Hard and MT-Bench "
    "(test sets as a whole), WikiText-2 test; an utterance of a training part that is in one of these as well"
)


@dataclass(frozen=True)
class CorpusSource:
    """Where documents come from. `share` is how often an epoch has each of them; 0.25 takes every fourth."""

    name: str
    what: str
    origin: str
    licence: str
    documents: Callable[[Path], Iterator[str]]
    share: float = 1.0

    def picked(self, documents: Sequence[str]) -> list[str]:
        """The documents of one epoch."""
        if self.share < 1:
            return list(documents[:: round(1 / self.share)])
        return list(documents) * round(self.share)


@dataclass(frozen=True)
class HeldOut:
    """A text that no training document has, in pieces that are scored one by one."""

    name: str
    what: str
    pieces: tuple[str, ...]

    @property
    def chars(self) -> int:
        return sum(map(len, self.pieces))


def squad(data: Path) -> Iterator[str]:
    """A passage of the training part, then its questions with their answers."""
    rows = get_task("squad", "short").open(data).records("train")
    for context, questions in groupby(rows, key=lambda row: row["context"]):
        asked = (f"Question: {row['question'].strip()}\nAnswer: {row['answers']['text'][0]}" for row in questions)
        yield "\n".join([context.strip(), *asked])


def wikitext(name: str) -> Callable[[Path], Iterator[str]]:
    """A file of WikiText-2 as plain prose, a paragraph a document."""

    def documents(data: Path) -> Iterator[str]:
        for line in (data / "wikitext2" / name).read_text(encoding="utf-8").splitlines():
            if len(line) > 80:
                yield plain(line)

    return documents


def plain(line: str) -> str:
    """WikiText's spaced-out tokens as prose. Its `<unk>` is written "unknown"."""
    text = line.strip().replace("<unk>", "unknown")
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]])|([(\[$]) ", r"\1\2", text)
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    return re.sub(r" (n't|'(?:s|t|re|ve|ll|d|m)\b)|(s) ' ", lambda match: match[1] or "s' ", text)


def task_rows(name: str, split: str = "train") -> Callable[[Path], Iterator[str]]:
    """Prompts of a task with their answers, as the task words them."""

    def documents(data: Path) -> Iterator[str]:
        for row in get_task(name).rows(split, data):
            yield f"{row.prompt} {row.completion}"

    return documents


def questions(name: str) -> Callable[[Path], Iterator[str]]:
    """A text-to-SQL question and its query, without the table."""

    def documents(data: Path) -> Iterator[str]:
        for record in get_task(name).open(data).records("train"):
            yield f"Question: {record['question'].strip()}\nSQL: {record['sql'][0]}"

    return documents


def utterances(name: str, split: str) -> Callable[[Path], Iterator[str]]:
    """What users say, without its intent."""

    def documents(data: Path) -> Iterator[str]:
        if name == "banking77":  # the task has ten of its intents; the text may be of any
            texts = (row["text"] for row in read_csv(data / "banking77" / f"{split}.csv"))
        else:
            texts = (record["text"] for record in get_task(name).open(data).records(split))
        yield from (" ".join(text.split()) for text in texts)

    return documents


def unseen_utterances(data: Path) -> Iterator[str]:
    """Utterances of every validation and test part."""
    for name, splits in {"snips": ("test",), "clinc_domains": ("validation", "test"), "banking77": ("test",)}.items():
        for split in splits:
            yield from utterances(name, split)(data)


def unseen_passages(data: Path) -> Iterator[str]:
    """The passages of SQuAD's dev part."""
    for article in read_array(data / "squad" / "dev-v1.1.json.gz", "data"):
        yield from (paragraph["context"].strip() for paragraph in article["paragraphs"])


SOURCES = (
    CorpusSource("squad", "passages, questions, answers (train)", "rajpurkar/SQuAD-explorer", "CC BY-SA 4.0", squad),
    CorpusSource("wikitext2", "paragraphs (valid)", "pytorch/examples", "CC BY-SA 3.0", wikitext("valid.txt")),
    CorpusSource(
        "wikisql", "questions, SQL (train)", "jkkummerfeld/text2sql-data", "BSD-3-Clause", questions("wikisql"), 0.25
    ),
    CorpusSource(
        "advising", "questions, SQL (train)", "jkkummerfeld/text2sql-data", "CC BY 4.0", questions("advising")
    ),
    CorpusSource("gsm8k", "problems, solutions (train)", "openai/grade-school-math", "MIT", task_rows("gsm8k")),
    CorpusSource("mmlu", "worked examples (dev)", "hendrycks/test", "MIT", task_rows("mmlu", "shots")),
    CorpusSource("snips", "utterances (train)", "sonos/nlu-benchmark", "CC0 1.0", utterances("snips", "train"), 2),
    CorpusSource(
        "clinc150", "utterances (train)", "clinc/oos-eval", "CC BY 3.0", utterances("clinc_domains", "train"), 2
    ),
    CorpusSource(
        "banking77",
        "utterances (train)",
        "PolyAI-LDN/task-specific-datasets",
        "CC BY 4.0",
        utterances("banking77", "train"),
        2,
    ),
)


def documents(data: Path) -> dict[str, list[str]]:
    """The training documents of each source, each once, without what the held-out utterances say. Raises DataError."""
    seen = {key(text) for text in _texts("utterances", data, unseen_utterances)}
    kept_of: dict[str, list[str]] = {}
    for source in SOURCES:
        kept_of[source.name] = kept = []
        for text in _texts(source.name, data, source.documents):
            if key(text) not in seen:
                seen.add(key(text))
                kept.append(text)
        if not kept:
            raise DataError(f"data: {source.name} under {str(data)!r} holds no document; fetch it again", param="data")
    return kept_of


def held_out(data: Path) -> tuple[HeldOut, ...]:
    """The texts that quality is measured on. Raises DataError."""
    texts = (
        ("wikitext2", "WikiText-2 test as plain prose", wikitext("test.txt")),
        ("squad", "passages of SQuAD dev", unseen_passages),
        ("utterances", "SNIPS, CLINC150, Banking77: validation and test", unseen_utterances),
    )
    held = tuple(HeldOut(name, what, _some(_texts(name, data, read))) for name, what, read in texts)
    for text in held:
        if not text.pieces:
            raise DataError(f"data: {str(data)!r} holds no held-out text ({text.what}); fetch it again", param="data")
    return held


def key(text: str) -> str:
    """Texts of equal keys are the same document."""
    return " ".join(re.findall(r"\w+", text.lower())) or text


def _texts(name: str, data: Path, read: Callable[[Path], Iterator[str]]) -> list[str]:
    """All that `read` finds and is not empty. Raises DataError for files in another form than the published one."""
    try:
        return [text for text in read(data) if text]
    except (*MALFORMED, zlib.error) as error:
        raise DataError(
            f"data: {name} under {str(data)!r} is missing or not as published ({type(error).__name__}: {error}); "
            "fetch it again",
            param="data",
        ) from error


def _some(texts: Sequence[str]) -> tuple[str, ...]:
    """Pieces spread evenly over all of them, `HELD_OUT_CHARS` characters in all."""
    step = max(1, sum(map(len, texts)) // HELD_OUT_CHARS)
    return tuple(texts[::step])
