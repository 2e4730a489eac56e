"""A tenant's held-out rows: how they are put to its adapter and to the bare backbone, and what answers are worth."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.comparison.untrained import MATCH, Untrained, prompt_of
from pedro.data.row_shapes import parse_line
from pedro.data.tasks import TaskRow, get_task
from pedro.data.tool_calls import Message
from pedro.evaluation.metrics import score_answers

if TYPE_CHECKING:
    from pedro.data.demo import DemoTenant

Messages = Sequence[Message]
METRICS = {"f1_em": "f1"}
"""Which part of a task's metric is shown, where it is not the one of the metric's name."""


@dataclass(frozen=True)
class Question:
    """`messages` are the tenant's request to its adapter, `row` the same in the words of the benchmark task."""

    messages: Messages
    row: TaskRow


class Questions:
    """The first `most` test rows of a tenant (their files are in an order of chance)."""

    def __init__(self, tenant: DemoTenant, most: int) -> None:
        self.task = get_task(tenant.task)
        self.metric = METRICS.get(self.task.metric, self.task.metric)
        self.asked = read_questions(tenant.test, tenant.template)[:most]
        self._train = [question.row for question in read_questions(tenant.train, tenant.template)]

    @property
    def rows(self) -> list[TaskRow]:
        return [question.row for question in self.asked]

    def to_adapter(self) -> list[Messages]:
        return [question.messages for question in self.asked]

    def to_backbone(self) -> list[Messages]:
        """The task's instruction, which lists the labels, and the row."""
        return [({"role": "user", "content": prompt_of(self.task, row, ())},) for row in self.rows]

    def with_examples(self, shots: int | str) -> list[str]:
        """The instruction, worked examples and the row as a text to be continued: the bare model does better so than
        with examples as turns of a chat."""
        examples = Untrained(shots, MATCH).examples(self.task, self._train, seed=0)
        return [prompt_of(self.task, row, examples) for row in self.rows]

    def score(self, answers: Sequence[str]) -> float:
        """The mean over rows of the tenant's metric."""
        return score_answers(self.task, self.rows, answers).parts[self.metric]

    def majority(self) -> float | None:
        """The accuracy of the most frequent answer; None where answers are no labels."""
        if not self.task.words.labels:
            return None
        counts = Counter(row.completion for row in self.rows)
        return counts.most_common(1)[0][1] / len(self.rows)


def read_questions(path: Path, template: str) -> list[Question]:
    """Every row of a tenant's file; `answers`, where a line has them, are all that are right."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        accepted = tuple(json.loads(line).get("answers", ()))
        for example in parse_line(line, number):
            prompt = template.replace("{prompt}", example.messages[-1]["content"])
            questions.append(Question(example.messages, TaskRow(prompt, example.completion, accepted)))
    return questions
