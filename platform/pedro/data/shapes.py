"""One JSON line becomes training examples. Knows nothing of files, tokenizers or templates.

Four shapes are read:

    messages     {"messages": [{"role", "content"}, ...]}           OpenAI chat fine-tuning
    completion   {"prompt", "completion"} or {"prompt", "response"}
    alpaca       {"instruction", "input"?, "output"}
    sharegpt     {"conversations": [{"from", "value"}, ...]}

Whatever the shape, an example is the messages that condition the answer, and the answer. In a conversation each
assistant turn is an example of its own, conditioned on all before it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pedro.errors import DataError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
TURN_FIELDS = ("role", "content", "from", "value", "weight")


class Shape(StrEnum):
    MESSAGES = "messages"
    COMPLETION = "completion"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"


# What a line of each shape must hold; a tuple is a choice of names for one field.
REQUIRED: dict[Shape, tuple[tuple[str, ...], ...]] = {
    Shape.MESSAGES: (("messages",),),
    Shape.COMPLETION: (("prompt",), ("completion", "response")),
    Shape.ALPACA: (("instruction",), ("output",)),
    Shape.SHAREGPT: (("conversations",),),
}


class LineError(DataError):
    """One line of a file is wrong: `line` (from 1), `field` and `reason`."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        super().__init__(f"line {line}: {field}: {reason}", param=field)
        self.line = line
        self.field = field
        self.reason = reason

    def __reduce__(self):
        return LineError, (self.line, self.field, self.reason)


@dataclass(frozen=True)
class Example:
    """`messages` ({"role", "content"} each) condition the answer `completion`; `line` is where it came from."""

    messages: tuple[dict[str, str], ...]
    completion: str
    line: int


@dataclass(frozen=True)
class ParsedLine:
    """A good line. `ignored` names what the line holds and training leaves out."""

    number: int
    shape: Shape
    examples: tuple[Example, ...]
    ignored: tuple[str, ...] = ()


def parse_line(line: str, number: int) -> list[Example]:
    """The examples of one JSON line. Raises LineError."""
    return list(read_line(line, number).examples)


def read_line(line: str, number: int) -> ParsedLine:
    """One JSON line, its shape and its examples. Raises LineError."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} at column {error.colno}"
        if line.lstrip()[:1] == "[":
            reason += "; a JSON array is not JSONL: put one object on each line"
        raise LineError(number, "line", reason) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a tower of brackets
        raise LineError(number, "line", f"JSON that cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise LineError(number, "line", f"expected a JSON object, got {_kind(row)}")
    shape = _shape(row, number)
    if shape is Shape.MESSAGES:
        return _conversation(row, "messages", number, shape)
    if shape is Shape.SHAREGPT:
        return _conversation(row, "conversations", number, shape)
    if shape is Shape.ALPACA:
        return _alpaca(row, number)
    return _completion(row, number)


def _shape(row: dict[str, Any], number: int) -> Shape:
    def has(names: tuple[str, ...]) -> bool:
        return any(name in row for name in names)

    fits = [shape for shape, fields in REQUIRED.items() if all(map(has, fields))]
    if len(fits) == 1:
        return fits[0]
    if fits:
        both = " and ".join(fits)
        raise LineError(number, "line", f"fits {both} at once; keep the fields of one shape")
    for shape, fields in REQUIRED.items():
        missing = [names for names in fields if not has(names)]
        if len(missing) < len(fields):
            name = " or ".join(missing[0])
            raise LineError(number, missing[0][0], f"missing: a line with {_names(row)} also needs {name} ({shape})")
    known = "messages; prompt and completion; instruction and output; conversations"
    raise LineError(number, "line", f"no known shape in {_names(row)}; give one of: {known}")


def _completion(row: dict[str, Any], number: int) -> ParsedLine:
    if "completion" in row and "response" in row:
        raise LineError(number, "response", "given beside completion; keep one of the two")
    answer = "completion" if "completion" in row else "response"
    prompt = _text(row["prompt"], "prompt", number, blank=False)
    example = Example(({"role": "user", "content": prompt},), _text(row[answer], answer, number), number)
    return ParsedLine(number, Shape.COMPLETION, (example,), _extra(row, "prompt", answer))


def _alpaca(row: dict[str, Any], number: int) -> ParsedLine:
    instruction = _text(row["instruction"], "instruction", number, blank=False)
    given = _text(row["input"], "input", number) if row.get("input") is not None else ""
    completion = _text(row["output"], "output", number)
    messages: tuple[dict[str, str], ...] = ({"role": "user", "content": instruction},)
    if given.strip():
        messages = ({"role": "system", "content": instruction}, {"role": "user", "content": given})
    extra = _extra(row, "instruction", "input", "output")
    return ParsedLine(number, Shape.ALPACA, (Example(messages, completion, number),), extra)


def _conversation(row: dict[str, Any], field: str, number: int, shape: Shape) -> ParsedLine:
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise LineError(number, field, f"expected a list of turns, got {_kind(turns, empty=True)}")
    ignored = set(_extra(row, field))
    messages: list[dict[str, str]] = []
    examples: list[Example] = []
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        message = _message(turn, where, number) if shape is Shape.MESSAGES else _sharegpt_turn(turn, where, number)
        weight = turn.get("weight", 1)
        if weight not in (0, 1):
            raise LineError(number, f"{where}.weight", f"expected 0 or 1, got {weight!r}")
        ignored |= {
            f"{field}[].{_short(key)}" for key in turn if key not in ("role", "content", "from", "value", "weight")
        }
        if message["role"] == "assistant":
            if not any(before["content"].strip() for before in messages):
                raise LineError(number, where, "an answer with nothing before it: there is no prompt to answer")
            if weight == 1:
                examples.append(Example(tuple(messages), message["content"], number))
        messages.append(message)
    if not examples:
        raise LineError(number, field, "no assistant turn to learn from")
    if messages[-1]["role"] != "assistant":
        ignored.add(f"{field}: turns after the last answer")
    return ParsedLine(number, shape, tuple(examples), tuple(sorted(ignored)))


def _message(message: Any, where: str, line: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise LineError(line, where, f"expected an object with role and content, got {_kind(message)}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise LineError(line, f"{where}.role", f"expected one of {', '.join(ROLES)}; got {_kind(role, show=True)}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise LineError(line, f"{where}.{key}", "tool calls are not supported; give the answer as content")
    return {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content", line)}


def _sharegpt_turn(turn: Any, where: str, line: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise LineError(line, where, f"expected an object with from and value, got {_kind(turn)}")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise LineError(line, f"{where}.from", f"expected one of {known}; got {_kind(speaker, show=True)}")
    return {"role": SPEAKERS[speaker], "content": _text(turn.get("value"), f"{where}.value", line)}


def _content(content: Any, where: str, line: int) -> str:
    """Text, or the text parts of OpenAI's list form joined."""
    if not isinstance(content, list):
        return _text(content, where, line)
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise LineError(line, f"{where}[{index}]", 'only {"type": "text", "text": ...} parts are supported')
        parts.append(_text(part.get("text"), f"{where}[{index}].text", line))
    return "".join(parts)


def _text(value: Any, where: str, line: int, blank: bool = True) -> str:
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, int | float) else ""
        raise LineError(line, where, f"expected text, got {_kind(value)}{hint}")
    if not blank and not value.strip():
        raise LineError(line, where, "empty: the answer needs something to answer")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LineError(line, where, "half of a UTF-16 surrogate pair (\\ud800-\\udfff) is not text") from None
    return value


def _extra(row: dict[str, Any], *known: str) -> tuple[str, ...]:
    return tuple(sorted(_short(key) for key in row if key not in known))


def _names(row: dict[str, Any]) -> str:
    return ", ".join(_short(key) for key in list(row)[:8]) or "an empty object"


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."


def _kind(value: Any, show: bool = False, empty: bool = False) -> str:
    """What `value` is, in JSON's words; with `show` a short text is quoted, with `empty` an empty list is said."""
    if value is None:
        return "null or nothing"
    if isinstance(value, str):
        return f"{value[:40]!r}" if show else "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list | tuple):
        return "an empty list" if empty and not value else "a list"
    return "an object"
