"""COPA: the likelier cause or effect of two (Roemmele et al., 2011; SuperGLUE).

With Balanced COPA (Kavumba et al., 2019) beside SuperGLUE's validation set, the training rows are those of Balanced
COPA whose premise, or whose twin's premise, is not in the validation set.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from pedro.data.tasks.parsers import parse_choice
from pedro.data.tasks.sources import HubSource, Part, Record, read_jsonl
from pedro.data.tasks.task import Task, TaskRow, Wording
from pedro.errors import DataError

TWIN = 1000  # Balanced COPA's item n + 1000 has the choices of item n and another premise
LETTERS = {"choice1": "A", "choice2": "B"}
BODY = "{premise}\n{ask}\nA. {choice1}\nB. {choice2}\nAnswer:"


def read(path: Path) -> Iterator[Record]:
    return _read_balanced(path) if path.suffix == ".xml" else read_jsonl(path)


def _read_balanced(path: Path) -> Iterator[Record]:
    held_out = {_plain(record["premise"]) for record in read_jsonl(path.with_name("val.jsonl"))}
    try:
        items = list(ElementTree.parse(path).getroot().iter("item"))  # noqa: S314 - a file that the user chose
    except ElementTree.ParseError as error:
        raise DataError(f"data: {str(path)!r} is not XML: {error}", param="data") from None
    seen = {int(item.attrib["id"]) % TWIN for item in items if _plain(item.findtext("p") or "") in held_out}
    for item in items:
        if int(item.attrib["id"]) % TWIN not in seen:
            yield {
                "premise": item.findtext("p"),
                "choice1": item.findtext("a1"),
                "choice2": item.findtext("a2"),
                "question": item.attrib["asks-for"],
                "label": int(item.attrib["most-plausible-alternative"]) - 1,
            }


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    label = record["label"]
    choices = (record["choice1"].strip(), record["choice2"].strip())
    ask = "What was the cause?" if record["question"] == "cause" else "What happened as a result?"
    fields = {"premise": record["premise"].strip(), "ask": ask, "choice1": choices[0], "choice2": choices[1]}
    name = label if isinstance(label, str) else ("choice1", "choice2")[label]
    return TaskRow(words.prompt(fields, shots), words.label(name), extra={"choices": choices})


TASK = Task(
    name="copa",
    title="COPA: the likelier cause or effect",
    metric="accuracy",
    licence="BSD-2-Clause (original); not stated where the files are from",
    source="https://people.ict.usc.edu/~gordon/copa.html, super.gluebenchmark.com",
    wordings={"full": Wording(BODY, LETTERS), "short": Wording("{premise}\n{ask}\nA {choice1}\nB {choice2}", LETTERS)},
    make=make,
    parser=parse_choice,
    read=read,
    layouts=(
        {"train": Part(("balanced-copa-dev-all.xml",)), "test": Part(("val.jsonl",))},
        {"train": Part(("train.jsonl",)), "test": Part(("val.jsonl",))},
    ),
    hub=HubSource(
        "aps/super_glue",
        {"train": "train", "test": "validation"},
        configs=("copa",),
        rows={"train": 400, "test": 100},
    ),
    max_new_tokens=8,
    stops=("\n\n",),
)
