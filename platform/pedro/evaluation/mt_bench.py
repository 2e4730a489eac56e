"""Runs MT-Bench: asks the two turns, writes answers and marks as FastChat does.

A model is a function from messages to text. The judge is any endpoint of the OpenAI API; without one the answers are
still written, and `python -m fastchat.llm_judge.gen_judgment` can mark them later.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pedro.errors import UnavailableError

if TYPE_CHECKING:
    import httpx

    from pedro.data.tasks import TaskRow

Messages = list[dict[str, str]]
Chat = Callable[[Messages, float], str]
"""(messages, temperature) -> the assistant's next turn."""
JsonRecord = dict[str, Any]

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # 0 for the others, as FastChat
WITH_REFERENCE = ("math", "reasoning", "coding")
RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
NO_RATING = -1
PROMPTS = Path(__file__).parents[1] / "assets" / "tasks" / "mt_bench" / "judge_prompts.jsonl"
RETRY_STATUS = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Judge:
    """An endpoint of the OpenAI API and the model that marks there."""

    base_url: str
    model: str
    api_key: str = "none"
    timeout_s: float = 120.0
    tries: int = 4
    pause_s: float = 2.0
    """Before the second try; doubled before each one after."""

    def ask(self, system: str, prompt: str) -> str:
        """The judge's answer at temperature 0. Raises UnavailableError if the endpoint keeps refusing."""
        import httpx

        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 2048,
        }
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                reply = httpx.post(
                    f"{self.base_url.rstrip('/')}/chat/completions",
                    json=body,
                    headers={"Authorization": f"Bearer {self.api_key}"},
                    timeout=self.timeout_s,
                )
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                continue
            if reply.is_success:
                return _content(reply, self.base_url)
            reason = f"status {reply.status_code}"
            if reply.status_code not in RETRY_STATUS:
                break
        raise UnavailableError(
            f"judge: {self.model} at {self.base_url} does not answer: {reason}; check its address, model and key",
            param="judge",
        )


def ask_questions(rows: Iterable[TaskRow], chat: Chat, model: str) -> Iterator[JsonRecord]:
    """Each question's answers in FastChat's form; the second turn is asked with the first and its answer before it."""
    for row in rows:
        messages: Messages = []
        turns = []
        for turn in row.extra["turns"]:
            messages.append({"role": "user", "content": turn})
            turns.append(chat([*messages], TEMPERATURES.get(row.group, 0.0)).strip())
            messages.append({"role": "assistant", "content": turns[-1]})
        identity = json.dumps([model, row.id, turns])
        yield {
            "question_id": int(row.id),
            "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
        }


def judge_answers(rows: Iterable[TaskRow], answers: Iterable[JsonRecord], judge: Judge) -> Iterator[JsonRecord]:
    """Two marks a question (1 to 10; -1 where the judge gave none), in the form of FastChat's `*_single.jsonl`.

    Marks come one by one, so that a caller can write each before the next is asked for. Raises UnavailableError.
    """
    row_of = {int(row.id): row for row in rows}
    for answer in answers:
        row = row_of[answer["question_id"]]
        for turn in range(len(row.extra["turns"])):
            name, system, prompt = judge_prompt(row, answer["choices"][0]["turns"], turn)
            judgment = judge.ask(system, prompt)
            yield {
                "question_id": answer["question_id"],
                "model": answer["model_id"],
                "judge": [judge.model, name],
                "user_prompt": prompt,
                "judgment": judgment,
                "score": read_rating(judgment),
                "turn": turn + 1,
                "tstamp": time.time(),
            }


def judge_prompt(row: TaskRow, answers: Sequence[str], turn: int) -> tuple[str, str, str]:
    """Name, system prompt and user prompt with which turn 0 or 1 is marked; with the reference where there is one."""
    references = row.extra["reference_turns"] if row.group in WITH_REFERENCE else ()
    name = f"single{'-math' if references else ''}-v1{'-multi-turn' if turn else ''}"
    fields = {f"ref_answer_{index}": text for index, text in enumerate(references, 1)}
    if turn:
        questions = row.extra["turns"]
        fields |= {f"question_{index}": text for index, text in enumerate(questions, 1)}
        fields |= {f"answer_{index}": text for index, text in enumerate(answers, 1)}
    else:
        fields |= {"question": row.extra["turns"][0], "answer": answers[0]}
    prompt = _prompts()[name]
    return name, prompt["system_prompt"], prompt["prompt_template"].format_map(fields)


def read_rating(judgment: str) -> float:
    """The mark in a judgment: "[[7]]", or "[7]" if that is missing; -1 if there is none."""
    for pattern in RATING:
        match = pattern.search(judgment)
        if match:
            return float(match[1])
    return NO_RATING


def summary(judgments: Iterable[JsonRecord], rows: Iterable[TaskRow]) -> dict[str, Any]:
    """Mean marks: all, by turn and by category. Turns without a mark are counted and left out, as FastChat does."""
    category = {int(row.id): row.group for row in rows}
    marks: dict[str, list[float]] = defaultdict(list)
    unrated = 0
    for judgment in judgments:
        if judgment["score"] == NO_RATING:
            unrated += 1
            continue
        for name in ("score", f"turn_{judgment['turn']}", category[judgment["question_id"]]):
            marks[name].append(judgment["score"])
    return {**{name: fmean(values) for name, values in sorted(marks.items())}, "unrated": unrated}


def write_records(path: Path, records: Iterable[JsonRecord]) -> int:
    """Writes each record as a line as soon as it is there; how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            count += 1
    return count


@lru_cache(maxsize=1)
def _prompts() -> dict[str, JsonRecord]:
    return {record["name"]: record for record in map(json.loads, PROMPTS.read_text().splitlines())}


def _content(reply: httpx.Response, url: str) -> str:
    try:
        return reply.json()["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError):
        raise UnavailableError(f"judge: {url} gave no chat completion; check its address", param="judge") from None
