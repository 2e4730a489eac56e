"""SQuAD 1.1: the span of a passage that answers a question (Rajpurkar et al., 2016)."""

from collections.abc import Iterator
from pathlib import Path

from pedro.data.tasks.parsers import parse_span
from pedro.data.tasks.sources import HubSource, Part, Record, read_array
from pedro.data.tasks.task import Task, TaskRow, Wording


def read(path: Path) -> Iterator[Record]:
    """The official JSON, one article at a time."""
    for article in read_array(path, "data"):
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                texts = [answer["text"] for answer in question["answers"]]
                yield {**question, "context": paragraph["context"], "answers": {"text": texts}}


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    answers = tuple(record["answers"]["text"])
    fields = {"context": record["context"].strip(), "question": record["question"].strip()}
    return TaskRow(words.prompt(fields, shots), answers[0], answers, id=record["id"], system=words.told(fields))


TASK = Task(
    name="squad",
    title="SQuAD 1.1: answer from a passage",
    metric="f1_em",
    licence="CC-BY-SA-4.0",
    source="https://rajpurkar.github.io/SQuAD-explorer",
    wordings={
        "full": Wording(
            "Passage: {context}\nQuestion: {question}\nAnswer:",
            instruction="Answer the question in words of the passage, as few as possible.",
        ),
        "short": Wording("{context}\n{question}"),
        "system": Wording(
            "Question: {question}\nAnswer:",
            system="Answer the question in words of the passage, as few as possible.\nPassage: {context}",
        ),
    },
    make=make,
    parser=parse_span,
    read=read,
    layouts=(
        {"train": Part(("train-v1.1.json.gz",)), "test": Part(("dev-v1.1.json.gz",))},
        {"train": Part(("train-v1.1.json",)), "test": Part(("dev-v1.1.json",))},
    ),
    hub=HubSource("rajpurkar/squad", {"train": "train", "test": "validation"}, rows={"train": 87599, "test": 10570}),
    max_new_tokens=48,
    stops=("\n\n",),
)
