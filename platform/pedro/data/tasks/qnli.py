"""QNLI: does a sentence answer a question (Wang et al., 2018; GLUE, from SQuAD)."""

from pedro.data.tasks.parsers import parse_label
from pedro.data.tasks.sources import HubSource, Part, Record, read_tsv
from pedro.data.tasks.task import Task, TaskRow, Wording

YES_NO = {"entailment": "yes", "not_entailment": "no"}


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    fields = {"question": record["question"].strip(), "sentence": record["sentence"].strip()}
    return TaskRow(words.prompt(fields, shots), words.label(record["label"]))


TASK = Task(
    name="qnli",
    title="QNLI: does the sentence answer the question",
    metric="accuracy",
    licence="derived from SQuAD (CC-BY-SA-4.0)",
    source="https://gluebenchmark.com",
    wordings={
        "full": Wording(
            'Sentence: {sentence}\nQuestion: {question}\nDoes the sentence answer the question, "yes" or "no"?\n'
            "Answer:",
            YES_NO,
        ),
        "short": Wording("{sentence}\n{question}", YES_NO),
    },
    make=make,
    parser=parse_label,
    read=read_tsv,
    layouts=(
        {"train": Part(("train.tsv",)), "test": Part(("dev.tsv",))},
        {  # the dev set alone, cut by its questions
            "train": Part(("dev.tsv",), low=0.0, high=0.7),
            "validation": Part(("dev.tsv",), low=0.7, high=0.8),
            "test": Part(("dev.tsv",), low=0.8, high=1.0),
        },
    ),
    hub=HubSource(
        "nyu-mll/glue",
        {"train": "train", "test": "validation"},
        configs=("qnli",),
        rows={"train": 104743, "test": 5463},
    ),
    cut_by="question",
    max_new_tokens=8,
    stops=("\n\n",),
)
