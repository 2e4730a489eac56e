"""RTE: does one sentence entail another (Dagan et al., 2005; GLUE)."""

from pedro.data.tasks.parsers import parse_label
from pedro.data.tasks.sources import HubSource, Part, Record, read_tsv
from pedro.data.tasks.task import Task, TaskRow, Wording

YES_NO = {"entailment": "yes", "not_entailment": "no"}


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    fields = {"premise": record["sentence1"].strip(), "hypothesis": record["sentence2"].strip()}
    return TaskRow(words.prompt(fields, shots), words.label(record["label"]))


TASK = Task(
    name="rte",
    title="RTE: textual entailment",
    metric="accuracy",
    licence="not stated",
    source="https://gluebenchmark.com",
    wordings={
        "full": Wording(
            'Premise: {premise}\nHypothesis: {hypothesis}\nDoes the premise entail the hypothesis, "yes" or "no"?\n'
            "Answer:",
            YES_NO,
        ),
        "short": Wording("{premise}\n{hypothesis}", YES_NO),
    },
    make=make,
    parser=parse_label,
    read=read_tsv,
    layouts=({"train": Part(("train.tsv",)), "test": Part(("dev.tsv",))},),
    hub=HubSource(
        "nyu-mll/glue",
        {"train": "train", "test": "validation"},
        configs=("rte",),
        rows={"train": 2490, "test": 277},
    ),
    max_new_tokens=8,
    stops=("\n\n",),
)
