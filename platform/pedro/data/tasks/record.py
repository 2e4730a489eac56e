"""ReCoRD: which entity of the passage belongs in the gap (Zhang et al., 2018; SuperGLUE)."""

from collections.abc import Iterator
from pathlib import Path

from pedro.data.tasks.parsers import parse_span
from pedro.data.tasks.sources import HubSource, Part, Record, read_jsonl
from pedro.data.tasks.task import Task, TaskRow, Wording


def read(path: Path) -> Iterator[Record]:
    """SuperGLUE's file has several questions a passage and entities by position (ends included)."""
    for record in read_jsonl(path):
        text = record["passage"]["text"]
        spans = [text[span["start"] : span["end"] + 1] for span in record["passage"]["entities"]]
        for question in record["qas"]:
            yield {
                "passage": text,
                "query": question["query"],
                "entities": list(dict.fromkeys(spans)),
                "answers": [answer["text"] for answer in question.get("answers", ())],
            }


def make(record: Record, words: Wording, shots: str) -> TaskRow | None:
    answers = tuple(dict.fromkeys(record["answers"]))
    if not answers:  # the hidden test set
        return None
    passage = record["passage"].strip().replace("\n@highlight\n", "\n- ")
    fields = {"passage": passage, "query": record["query"].strip(), "entities": ", ".join(record["entities"])}
    return TaskRow(words.prompt(fields, shots), answers[0], answers)


TASK = Task(
    name="record",
    title="ReCoRD: the entity that fills the gap",
    metric="f1_em",
    licence="not stated",
    source="https://sheng-z.github.io/ReCoRD-explorer, super.gluebenchmark.com",
    wordings={
        "full": Wording(
            "{passage}\n\n{query}\nWhich of these does @placeholder stand for: {entities}?\nAnswer:",
        ),
        "short": Wording("{passage}\n{query}"),
    },
    make=make,
    parser=parse_span,
    read=read,
    layouts=(
        {"train": Part(("train.jsonl",)), "test": Part(("val.jsonl",))},
        {"train": Part(("train.jsonl",)), "test": Part(("dev32.jsonl",))},  # the few-shot edition (FewGLUE)
    ),
    hub=HubSource(
        "aps/super_glue",
        {"train": "train", "test": "validation"},
        configs=("record",),
        rows={"train": 100730, "test": 10000},
    ),
    max_new_tokens=32,
    stops=("\n\n",),
)
