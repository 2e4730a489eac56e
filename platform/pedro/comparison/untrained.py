"""The backbone itself as a row of a table: which worked examples it sees, and how its answer is taken. No tensors.

A model that was never told the task scores 0 by exact match however much it knows, so it is told: the task's
instruction, then worked examples. And its answer is taken in two ways, of which each has a row of its own: the
likeliest of the task's labels, or what it writes.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pedro.data.tasks import TEMPLATE, Task, TaskRow
from pedro.data.tasks.parsers import parse_choice

LABEL = "label"
LIKELIHOOD, MATCH = "likelihood", "match"
MOST_SHOTS = 256


@dataclass(frozen=True)
class Untrained:
    """How the bare backbone is asked. `shots` is a number of examples, or "label" for one of each label."""

    shots: int | str
    by: str

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Untrained:
        """From the options of a comparison's spec. Raises ValueError that names the option."""
        if unknown := [name for name in options if name not in ("shots", "by")]:
            raise ValueError(f"method.{unknown[0]}: unknown option; the backbone takes shots, by")
        shots, by = options.get("shots", 0), options.get("by", LIKELIHOOD)
        count = isinstance(shots, int) and not isinstance(shots, bool) and 0 <= shots <= MOST_SHOTS
        if not count and shots != LABEL:
            raise ValueError(f"method.shots: expected a number from 0 to {MOST_SHOTS}, or {LABEL!r}, got {shots!r}")
        if by not in (LIKELIHOOD, MATCH):
            raise ValueError(f"method.by: expected {LIKELIHOOD} or {MATCH}, got {by!r}")
        return cls(shots, by)

    @property
    def label(self) -> str:
        """What tables call it."""
        shown = {LABEL: "one example a label", 0: "no examples", 1: "1 example"}
        taken = "likeliest label" if self.by == LIKELIHOOD else "exact match"
        return f"Backbone, {shown.get(self.shots, f'{self.shots} examples')}, {taken}"

    def fits(self, task: Task) -> bool:
        """Whether the task can be asked so: one of its labels, or an answer that a metric takes."""
        if task.metric in ("loss", "judge"):
            return False
        has_labels = bool(task.words.labels) or task.parser is parse_choice
        return has_labels or (self.by == MATCH and self.shots != LABEL)

    def check(self, trained: str, scored: Sequence[Task]) -> None:
        """Raise ValueError where it would be asked in words that say nothing, or by other tasks' examples."""
        for task in filter(self.fits, scored):
            if not task.words.ending:
                raise ValueError(
                    f"methods.backbone: the wording {task.wording!r} of {task.name} does not say what is asked, so its "
                    f"score would mean nothing; use wording: {TEMPLATE}, or leave the backbone out"
                )
            if self.shots and task.words.system:
                raise ValueError(
                    f"methods.backbone.shots: the wording {task.wording!r} of {task.name} tells what belongs to a "
                    "question in its system turn, so there are no examples; use shots: 0"
                )
            if self.shots and task.name != trained:
                raise ValueError(
                    f"methods.backbone.shots: examples are rows that are trained on, and these are {trained}'s; "
                    f"use shots: 0 for {task.name}"
                )

    def examples(self, task: Task, rows: Sequence[TaskRow], seed: int) -> list[TaskRow]:
        """The worked examples, drawn from the training rows and shuffled: another choice for each seed.

        A number of them takes as many different answers as it can.
        """
        drawn = random.Random(f"{task.name} {seed}")  # noqa: S311 - a choice of rows
        by_answer: dict[str, list[TaskRow]] = defaultdict(list)
        for row in rows:
            by_answer[row.completion if candidates(task, row) else ""].append(row)
        answers = sorted(by_answer)
        drawn.shuffle(answers)
        count = len(answers) if self.shots == LABEL else min(int(self.shots), len(rows))
        pools = {answer: drawn.sample(found, min(len(found), count)) for answer, found in by_answer.items()}
        picked: list[TaskRow] = []
        while len(picked) < count:
            picked += [pools[answer].pop() for answer in answers if pools[answer]][: count - len(picked)]
        drawn.shuffle(picked)
        return picked


def candidates(task: Task, row: TaskRow) -> list[str]:
    """The labels among which the likeliest is taken: the task's own, or the row's choices, by letter or spelled out."""
    if task.words.labels:
        return list(dict.fromkeys(task.words.labels.values()))
    if task.parser is parse_choice:
        choices = list(row.extra.get("choices", ()))
        return choices if task.words.spelled else [chr(ord("A") + place) for place in range(len(choices))]
    return []


def prompt_of(task: Task, row: TaskRow, examples: Sequence[TaskRow]) -> str:
    """The task's instruction, the worked examples and the row's own prompt."""
    head = f"{task.words.instruction}\n\n" if task.words.instruction else ""
    return head + "".join(f"{example.prompt} {example.completion}\n\n" for example in examples) + row.prompt
