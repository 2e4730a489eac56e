"""Scores answers to benchmark tasks: accuracy, F1 and exact match, SQL.

An answer is what a model wrote; the task's parser finds the answer in it, the metric compares. Every score keeps its
value for each row, so that two methods can be compared row by row.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError
from pedro.evaluation.sql import execution_match, normalise_sql

if TYPE_CHECKING:
    from pedro.data.tasks import Task, TaskRow

Parts = dict[str, float | None]
"""A row's values; None where the row cannot be judged so."""
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
ELSEWHERE = {
    "loss": "the loss of its answers is what pedro.evaluation.scoring.answer_loss gives",
    "judge": "its answers are marked by a judge (pedro.evaluation.mt_bench)",
}


@dataclass(frozen=True)
class TaskScore:
    """Of one model on one task. Values are fractions, means over rows (or over groups, where the task asks for it).

    `value` is the headline number, `parts` all of them; `groups` the headline by subject or sub-task; `unparsed` how
    many answers held none; `per_row` the headline of each row, in their order.
    """

    task: str
    metric: str
    value: float
    parts: dict[str, float]
    rows: int
    unparsed: int
    groups: dict[str, float]
    per_row: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Metric:
    """`headline` is the part that counts; `score` gives a row's parts from the parsed answer."""

    headline: str
    score: Callable[[str, TaskRow], Parts]


def score_answers(task: Task, rows: Sequence[TaskRow], answers: Sequence[str]) -> TaskScore:
    """The score of generated `answers`, one a row. Raises ConfigError for a task whose metric needs more than them."""
    if task.metric in ELSEWHERE:
        raise ConfigError(f"metric: {task.name} has none for answers alone; {ELSEWHERE[task.metric]}", param="metric")
    assert len(rows) == len(answers), f"{len(answers)} answers to {len(rows)} rows"
    metric = METRICS[task.metric]
    parsed = [task.parse(answer, row) for answer, row in zip(answers, rows, strict=True)]
    scores = [metric.score(answer, row) for answer, row in zip(parsed, rows, strict=True)]
    per_row = tuple(score[metric.headline] or 0.0 for score in scores)
    by_group: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, per_row, strict=True):
        if row.group:
            by_group[row.group].append(value)
    groups = {group: fmean(values) for group, values in sorted(by_group.items())}
    over_groups = task.average == "groups" and bool(groups)
    names = dict.fromkeys(name for score in scores for name in score)
    judged = {name: [score[name] for score in scores if score.get(name) is not None] for name in names}
    return TaskScore(
        task=task.name,
        metric=task.metric,
        value=_mean(list(groups.values()) if over_groups else per_row),
        parts={name: _mean(values) for name, values in judged.items() if values},
        rows=len(rows),
        unparsed=sum(not answer for answer in parsed),
        groups=groups,
        per_row=per_row,
    )


def normalise_answer(text: str) -> str:
    """As SQuAD's evaluate-v1.1.py: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the precision and recall of words, as SQuAD's evaluate-v1.1.py: 0 if none is shared."""
    ours, theirs = normalise_answer(answer).split(), normalise_answer(reference).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)


def f1_em(answer: str, references: Sequence[str]) -> tuple[float, float]:
    """F1 and exact match of the best reference each, as SQuAD's and ReCoRD's scripts take them."""
    plain = normalise_answer(answer)
    exact = float(any(plain == normalise_answer(reference) for reference in references))
    return max(token_f1(answer, reference) for reference in references), exact


def equal(answer: str, reference: str) -> bool:
    """Whether two parsed answers are the same, whatever their case and spacing."""
    return " ".join(answer.split()).casefold() == " ".join(reference.split()).casefold()


def _accuracy(answer: str, row: TaskRow) -> Parts:
    return {"accuracy": float(bool(answer) and any(equal(answer, reference) for reference in row.accepted))}


def _f1_em(answer: str, row: TaskRow) -> Parts:
    f1, exact = f1_em(answer, row.accepted)
    return {"f1_em": (f1 + exact) / 2, "f1": f1, "exact_match": exact}


def _sql(answer: str, row: TaskRow) -> Parts:
    plain = normalise_sql(answer)
    exact = bool(answer) and any(plain == normalise_sql(reference) for reference in row.accepted)
    parts: Parts = {"exact_match": float(exact), "execution": None}
    database = row.extra.get("database")
    if database is not None:
        same = execution_match(answer, row.accepted[0], database)
        parts["execution"] = None if same is None else float(same)
    return parts


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", _accuracy),
    "f1_em": Metric("f1_em", _f1_em),
    "sql": Metric("exact_match", _sql),
}


def _mean(values: Sequence[float | None]) -> float:
    return fmean(value or 0.0 for value in values) if values else float("nan")
