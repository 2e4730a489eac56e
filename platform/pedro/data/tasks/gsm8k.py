"""GSM8K: grade-school word problems (Cobbe et al., 2021). Right if the last number is."""

import re

from pedro.data.tasks.parsers import number, parse_number
from pedro.data.tasks.sources import HubSource, Part, Record, read_jsonl
from pedro.data.tasks.task import Task, TaskRow, Wording

CALCULATOR = re.compile(r"<<[^>]*>>")  # <<16-3-4=9>>: notes for a calculator that our models do not have


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    solution = CALCULATOR.sub("", record["answer"]).strip()
    answer = number(solution.rpartition("####")[2])
    if not answer:
        raise ValueError("'answer': no number after ####")
    return TaskRow(words.prompt({"question": record["question"].strip()}, shots), solution, (answer,))


TASK = Task(
    name="gsm8k",
    title="GSM8K: word problems",
    metric="accuracy",
    licence="MIT",
    source="https://github.com/openai/grade-school-math",
    wordings={"full": Wording("Question: {question}\nAnswer:"), "short": Wording("{question}")},
    make=make,
    parser=parse_number,
    read=read_jsonl,
    layouts=({"train": Part(("train.jsonl",)), "test": Part(("test.jsonl",))},),
    hub=HubSource(
        "openai/gsm8k",
        {"train": "train", "test": "test"},
        configs=("main",),
        rows={"train": 7473, "test": 1319},
    ),
    max_new_tokens=320,
    stops=("\nQuestion:", "\n\nQ:"),
)
