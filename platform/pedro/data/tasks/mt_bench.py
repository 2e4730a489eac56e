"""MT-Bench: 80 open questions of two turns, marked by a judge (Zheng et al., 2023).

A row's prompt is the first turn; `extra` holds both, the category and GPT-4's reference answers where there are some.
`pedro.evaluation.mt_bench` asks them and has the answers judged.
"""

from collections.abc import Iterator
from pathlib import Path

from pedro.data.tasks.parsers import parse_text
from pedro.data.tasks.sources import HubSource, Part, Record, read_jsonl
from pedro.data.tasks.task import Task, TaskRow, Wording

REFERENCES = ("gpt-4.jsonl", "reference_answer/gpt-4.jsonl")


def read(path: Path) -> Iterator[Record]:
    """FastChat's question.jsonl, with the reference answers that lie beside it."""
    references = [path.parent / name for name in REFERENCES if (path.parent / name).is_file()]
    answers = {
        record["question_id"]: record["choices"][0]["turns"] for file in references[:1] for record in read_jsonl(file)
    }
    for record in read_jsonl(path):
        yield {
            "prompt_id": record["question_id"],
            "category": record["category"],
            "prompt": record["turns"],
            "reference": answers.get(record["question_id"], record.get("reference", [])),
        }


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    turns, references = tuple(record["prompt"]), tuple(record["reference"] or ())
    return TaskRow(
        words.prompt({"turn": turns[0]}, shots),
        references[0] if references else "",
        group=record["category"],
        id=str(record["prompt_id"]),
        extra={"turns": turns, "reference_turns": references},
    )


TASK = Task(
    name="mt_bench",
    title="MT-Bench: open questions, judged",
    metric="judge",
    licence="Apache-2.0",
    source="https://github.com/lm-sys/FastChat",
    wordings={"full": Wording("{turn}")},
    make=make,
    parser=parse_text,
    read=read,
    layouts=({"test": Part(("question.jsonl",))},),
    hub=HubSource("HuggingFaceH4/mt_bench_prompts", {"test": "train"}, rows={"test": 80}),
    max_new_tokens=1024,
)
