"""SST-2: is a film review's sentence positive or negative (Socher et al., 2013; GLUE)."""

from pedro.data.tasks.parsers import parse_label
from pedro.data.tasks.sources import HubSource, Part, Record, read_tsv
from pedro.data.tasks.task import Task, TaskRow, Wording

CLASSES = ("negative", "positive")


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    label = record["label"]
    name = CLASSES[int(label)] if label in ("0", "1") else label
    return TaskRow(words.prompt({"sentence": record["sentence"].strip()}, shots), words.label(name))


TASK = Task(
    name="sst2",
    title="SST-2: sentiment of a sentence",
    metric="accuracy",
    licence="not stated",
    source="https://nlp.stanford.edu/sentiment, gluebenchmark.com",
    wordings={
        "full": Wording(
            "Sentence: {sentence}\nIs the sentiment of this sentence positive or negative?\nAnswer:",
            {"negative": "negative", "positive": "positive"},
        ),
        "short": Wording("{sentence}", {"negative": "bad", "positive": "good"}),
    },
    make=make,
    parser=parse_label,
    read=read_tsv,
    layouts=(
        {"train": Part(("train.tsv",)), "validation": Part(("dev.tsv",)), "test": Part(("test.tsv",))},
        {"train": Part(("train.tsv",)), "test": Part(("dev.tsv",))},
    ),
    hub=HubSource(
        "nyu-mll/glue",
        {"train": "train", "test": "validation"},
        configs=("sst2",),
        rows={"train": 67349, "test": 872},
    ),
    max_new_tokens=8,
    stops=("\n\n",),
)
