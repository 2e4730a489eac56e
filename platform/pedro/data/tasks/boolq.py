"""BoolQ: yes or no, from a passage (Clark et al., 2019; SuperGLUE)."""

from pedro.data.tasks.parsers import parse_label
from pedro.data.tasks.sources import HubSource, Part, Record, read_jsonl
from pedro.data.tasks.task import Task, TaskRow, Wording

YES_NO = {"true": "yes", "false": "no"}


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    answer = record["answer"] if "answer" in record else record["label"]
    fields = {"passage": record["passage"].strip(), "question": record["question"].strip().rstrip("?")}
    return TaskRow(words.prompt(fields, shots), words.label(str(answer).lower()))


TASK = Task(
    name="boolq",
    title="BoolQ: yes or no from a passage",
    metric="accuracy",
    licence="CC-BY-SA-3.0",
    source="https://github.com/google-research-datasets/boolean-questions",
    wordings={
        "full": Wording('Passage: {passage}\nQuestion: {question}?\nAnswer "yes" or "no".\nAnswer:', YES_NO),
        "short": Wording("{passage}\n{question}?", YES_NO),
    },
    make=make,
    parser=parse_label,
    read=read_jsonl,
    layouts=(
        {  # the few-shot edition (FewGLUE), whose train.jsonl has 32 rows: its validation set, cut by passages
            "train": Part(("val.jsonl",), low=0.0, high=0.7),
            "validation": Part(("val.jsonl",), low=0.7, high=0.8),
            "test": Part(("val.jsonl",), low=0.8, high=1.0),
            "shots": Part(("dev32.jsonl",)),
        },
        {"train": Part(("train.jsonl",)), "test": Part(("val.jsonl",))},
        {"train": Part(("train.jsonl",)), "test": Part(("dev.jsonl",))},
    ),
    hub=HubSource("google/boolq", {"train": "train", "test": "validation"}, rows={"train": 9427, "test": 3270}),
    cut_by="passage",
    max_new_tokens=8,
    stops=("\n\n",),
)
