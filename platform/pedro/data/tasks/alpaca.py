"""Alpaca: 52 thousand instructions with answers (Taori et al., 2023). What it teaches, MMLU, BBH and MT-Bench measure.

Its own metric is the loss on its validation share; rows keep Alpaca's fields, so they train in Alpaca's prompt format.
"""

from pedro.data.row_shapes import RowShape
from pedro.data.tasks.parsers import parse_text
from pedro.data.tasks.sources import HubSource, Part, Record, read_array
from pedro.data.tasks.task import Task, TaskRow, Wording


def make(record: Record, words: Wording, shots: str) -> TaskRow | None:
    if not record["output"].strip():  # 28 rows of the original have none
        return None
    return TaskRow(words.prompt(record, shots), record["output"], input=record["input"])


TASK = Task(
    name="alpaca",
    title="Alpaca: instruction tuning",
    metric="loss",
    licence="CC-BY-NC-4.0",
    source="https://github.com/tatsu-lab/stanford_alpaca",
    wordings={"full": Wording("{instruction}")},
    make=make,
    parser=parse_text,
    read=read_array,
    layouts=({"train": Part(("alpaca_data.json",))}, {"train": Part(("alpaca_union_subset.json",))}),
    hub=HubSource("tatsu-lab/alpaca", {"train": "train"}, rows={"train": 52002}),
    shape=RowShape.ALPACA,
    max_new_tokens=512,
)
