"""BIG-Bench Hard: 27 sub-tasks (Suzgun et al., 2022), scored as the mean over them.

Worked examples are the three of each sub-task's chain-of-thought prompt; the wording `cot` asks for the reasoning,
`full` for the answer alone.
"""

from collections.abc import Iterator
from pathlib import Path

from pedro.data.tasks.parsers import parse_reasoned
from pedro.data.tasks.sources import HubSource, Part, Record, read_array, read_text
from pedro.data.tasks.task import Task, TaskRow, Wording

STEPS = "Let's think step by step."
SUBTASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def read(path: Path) -> Iterator[Record]:
    """`<sub-task>.json` holds the questions, `<sub-task>.txt` its description and worked examples."""
    prompt = path.with_suffix(".txt")
    description, shots = _read_prompt(prompt) if prompt.is_file() else ("", [])
    shared = {"group": path.stem, "description": description}
    for record in shots if path == prompt else read_array(path, "examples"):
        yield {**record, **shared}


def _read_prompt(path: Path) -> tuple[str, list[Record]]:
    """The description and the worked examples; the canary line above them is left out."""
    with read_text(path) as stream:
        text = stream.read().partition("-----\n")[2]
    description, *blocks = text.split("\n\nQ: ")
    shots = []
    for block in blocks:
        question, _, answer = block.partition("\nA: ")
        target = answer.rpartition("answer is ")[2].strip().removesuffix(".")
        shots.append({"input": question, "target": target, "reasoning": answer.removeprefix(STEPS).strip()})
    return description.strip().removeprefix("Task description: "), shots


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    about = record.get("description", "")
    fields = {"about": f"{about}\n\n" if about else "", "input": record["input"].strip(), "steps": STEPS}
    target = record["target"].strip()
    completion = record.get("reasoning", target) if words.reasons else target
    return TaskRow(words.prompt(fields, shots), completion, (target,), group=record["group"])


TASK = Task(
    name="bbh",
    title="BIG-Bench Hard: 27 reasoning tasks",
    metric="accuracy",
    licence="MIT",
    source="https://github.com/suzgunmirac/BIG-Bench-Hard",
    wordings={
        "full": Wording("Q: {input}\nA:", head="{about}"),
        "cot": Wording("Q: {input}\nA: {steps}", head="{about}", reasons=True),
    },
    make=make,
    parser=parse_reasoned,
    read=read,
    layouts=({"test": Part(("*.json",)), "shots": Part(("*.txt",))}, {"test": Part(("*.json",))}),
    hub=HubSource("SaylorTwift/bbh", {"test": "test"}, configs=SUBTASKS, rows={"test": 6511}),
    max_new_tokens=512,
    stops=("\n\nQ:",),
    shots_from="shots",
    average="groups",
)
