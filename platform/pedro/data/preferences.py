"""Takes a row of preferences apart: a prompt, its better and its worse answer, and what belongs to both.

Two forms are read:

    {"input": {"messages": [turns], "tools"?}, "preferred_output": [turn], "non_preferred_output": [turn]}   OpenAI's
    {"prompt": text, "chosen": text, "rejected": text}, or each a list of turns                             TRL's

References: https://platform.openai.com/docs/guides/direct-preference-optimization and TRL's dataset formats. What the
answers are made of is read in `row_shapes.py`, as in any other row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pedro.data.mistakes import LineError, blank, kind_of, name_of
from pedro.errors import DataError

if TYPE_CHECKING:
    from pedro.data.row_shapes import RowShape

BETTER_AND_WORSE = (("preferred_output", "non_preferred_output"), ("chosen", "rejected"))
INPUT = ("messages", "tools", "parallel_tool_calls")


@dataclass(frozen=True)
class Pair:
    """`prompt` is text or turns, found under `prompt_field`; `fields` are the better and the worse of `answers`."""

    prompt: str | list[Any]
    prompt_field: str
    fields: tuple[str, str]
    answers: dict[str, Any]
    shared: dict[str, Any]
    ignored: tuple[str, ...] = ()


def read_pair(row: dict[str, Any], number: int) -> Pair:
    """The parts of a row that has two answers. Raises LineError."""
    openai, trl = BETTER_AND_WORSE
    fields = openai if openai[0] in row else trl
    answers = {field: row[field] for field in fields}
    if fields is trl:
        shared = {key: value for key, value in row.items() if key not in (*trl, "prompt")}
        return Pair(_prompt(row, answers, number), "prompt", trl, answers, shared)
    given = row.get("input")
    if not isinstance(given, dict):
        raise LineError(number, "input", f"expected an object with messages, got {kind_of(given)}")
    for name in INPUT:
        if not blank(row.get(name)):
            raise LineError(number, name, "belongs into input, beside its messages")
    turns = given.get("messages")
    if not isinstance(turns, list):
        raise LineError(number, "input.messages", f"expected a list of turns, got {kind_of(turns)}")
    shared = {key: value for key, value in row.items() if key not in (*openai, "input")}
    shared |= {name: given[name] for name in INPUT[1:] if given.get(name) is not None}
    ignored = tuple(f"input.{name_of(key)}" for key, value in given.items() if key not in INPUT and not blank(value))
    return Pair(turns, "input.messages", openai, answers, shared, ignored)


def one_turn(answer: Any, field: str, number: int) -> None:
    """Raise LineError for an answer that is not a single turn."""
    if not isinstance(answer, list) or len(answer) != 1:
        got = f"{len(answer)} turns" if isinstance(answer, list) and answer else kind_of(answer, empty=True)
        raise LineError(number, field, f"expected a list of one turn, the assistant's, got {got}")


def check_objective(objective: str, role: str, shape: RowShape | str) -> None:
    """Raise DataError where the file of this role holds rows that the objective cannot learn from."""
    from pedro.data.row_shapes import RowShape

    pairs = RowShape(shape).is_preference
    if pairs and objective != "dpo":
        raise DataError(
            f"data.{role}: holds preferences, which objective {objective} does not learn from; set objective: dpo, or "
            "write the better answers as messages or completion",
            param=f"data.{role}",
        )
    if objective == "dpo" and not pairs:
        raise DataError(
            f"data.{role}: holds {shape}, but objective dpo learns from preferences: rows of input, preferred_output "
            "and non_preferred_output, or of prompt, chosen and rejected; write those, or set objective: supervised",
            param=f"data.{role}",
        )


def _prompt(row: dict[str, Any], answers: dict[str, Any], number: int) -> str | list[Any]:
    if "prompt" not in row:
        reason = (
            "missing: give what both conversations begin with as prompt, and their last turns as chosen and rejected"
        )
        raise LineError(number, "prompt", reason)
    prompt = row["prompt"]
    if isinstance(prompt, list):
        return prompt
    for field, answer in answers.items():
        if isinstance(answer, list):
            reason = (
                f"a list of turns, but the prompt is {kind_of(prompt)}; give the prompt as turns, and one turn here"
            )
            raise LineError(number, field, reason)
    if not isinstance(prompt, str):
        raise LineError(number, "prompt", f"expected text or a list of turns, got {kind_of(prompt)}")
    return prompt
