"""MT-Bench in a comparison: the model's answers in FastChat's form, and their marks where a judge was named."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pedro.data.prompt_format import encode_prompt
from pedro.evaluation.mt_bench import Judge, Messages, ask_questions, judge_answers, summary, write_records
from pedro.evaluation.scoring import generate

if TYPE_CHECKING:
    from pedro.comparison.data import TestSet
    from pedro.comparison.run_planner import PlannedRun
    from pedro.comparison.spec_sections import JudgeSpec
    from pedro.training.context import TrainingContext

MARKS = 10.0


def judged_score(
    context: TrainingContext, plan: PlannedRun, test: TestSet, judge: JudgeSpec | None, cache: Path
) -> dict[str, Any] | None:
    """The mean mark (1 to 10) of a question's two turns; None without a judge. The answers are kept in either case.

    Raises UnavailableError if the judge does not answer.
    """
    folder = cache.parent / "comparisons" / plan.comparison / "mt_bench"

    def chat(messages: Messages, _temperature: float) -> str:
        """Greedy, whatever FastChat's temperature: a run must give the same answers again."""
        ids = encode_prompt(context.tokenizer, context.prepared.format.prompt(messages, context.tokenizer))
        room = max(1, context.prepared.max_length - len(ids))
        rows = [{"input_ids": ids, "prompt_len": len(ids)}]
        budget = min(room, test.task.max_new_tokens)
        return generate(context.model, context.tokenizer, rows, budget, num_beams=plan.num_beams)[0]

    answers = list(ask_questions(test.rows, chat, f"{plan.group.label}-{plan.id}"))
    write_records(folder / "model_answer" / f"{plan.id}.jsonl", answers)
    if judge is None:
        return None
    endpoint = Judge(judge.base_url, judge.model, os.environ.get(judge.api_key_variable, "none"))
    marks = list(judge_answers(test.rows, answers, endpoint))
    write_records(folder / "model_judgment" / f"{plan.id}.jsonl", marks)
    parts = summary(marks, test.rows)
    by_row: dict[int, list[float]] = {}
    for mark in marks:
        by_row.setdefault(mark["question_id"], []).append(max(0.0, mark["score"]))
    return {
        "task": test.task.name,
        "metric": "judge",
        "value": parts.get("score", 0.0),
        "parts": {name: value for name, value in parts.items() if name != "unrated"},
        "rows": len(by_row),
        "unparsed": parts["unrated"],
        "groups": {},
        "per_row": [fmean(values) for values in by_row.values()],
        "majority": None,
    }
