"""One row becomes training examples.

Six shapes are read:

    messages     {"messages": [{"role", "content"}, ...]}           OpenAI chat fine-tuning
                 {"prompt": [turns], "completion": [turns]}         TRL's conversational form, of which it is one
    completion   {"prompt", "completion"} or {"prompt", "response"}
    alpaca       {"instruction", "input"?, "output"}
    sharegpt     {"conversations": [{"from", "value"}, ...]}
    preference, preference-text    a prompt with a better and a worse answer (`preferences.py`)

Whatever the shape, an example is the messages that condition the answer, and the answer. In a conversation each
assistant turn is an example of its own, conditioned on all before it and on nothing of itself. `system` and `history`
beside the turns stand before them; an Alpaca row that has one is a conversation, since Alpaca's prompt has no place for
them. Rows of messages may hold `tools` and calls of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pedro.data.foreign import refuse_foreign
from pedro.data.mistakes import LineError, blank, kind_of, name_of, names_of, text_of
from pedro.data.preferences import BETTER_AND_WORSE, Pair, one_turn, read_pair
from pedro.data.tool_calls import Conversation, Message, Tool, read_tools
from pedro.data.turns import read_history, read_turns

SYSTEM = ("system", "system_prompt")
BEFORE = (*SYSTEM, "history")


class RowShape(StrEnum):
    MESSAGES = "messages"
    COMPLETION = "completion"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    PREFERENCE = "preference"
    PREFERENCE_TEXT = "preference-text"

    @property
    def is_preference(self) -> bool:
        """Whether a row holds two answers, of which one is preferred."""
        return self in (RowShape.PREFERENCE, RowShape.PREFERENCE_TEXT)


# What a line of each shape must hold; a tuple is a choice of names for one field.
OPENAI_PAIR, TRL_PAIR = BETTER_AND_WORSE
REQUIRED: dict[RowShape, tuple[tuple[str, ...], ...]] = {
    RowShape.PREFERENCE: tuple((name,) for name in OPENAI_PAIR),
    RowShape.PREFERENCE_TEXT: tuple((name,) for name in TRL_PAIR),  # of turns it is PREFERENCE
    RowShape.MESSAGES: (("messages",),),
    RowShape.COMPLETION: (("prompt",), ("completion", "response")),
    RowShape.ALPACA: (("instruction",), ("output",)),
    RowShape.SHAREGPT: (("conversations",),),
}
FIELDS = (
    "prompt", "completion", "response", "instruction", "input", "output", "messages", "conversations",
    *TRL_PAIR, *BEFORE,
)  # fmt: skip
Fields = Mapping[str, str]
"""Which column of a file stands for which field: {"prompt": "question", "completion": "answer"}."""


@dataclass(frozen=True)
class Example:
    """`messages` ({"role", "content"} each, with what else OpenAI's have) condition the answer `completion`; `line` is
    where it came from. `tools` are told before all messages. `answer` is the whole turn where it is more than its text:
    a format writes it (`example_text.py`). In a preference, `rejected` is the same prompt with the worse answer."""

    messages: tuple[Message, ...]
    completion: str
    line: int
    tools: tuple[Tool, ...] = ()
    answer: Message | None = None
    rejected: Example | None = None

    @property
    def plain(self) -> bool:
        """Whether it is texts of roles and nothing else."""
        return not self.tools and self.answer is None and all(len(message) == 2 for message in self.messages)


@dataclass(frozen=True)
class ParsedLine:
    """A good row. `ignored` names what it holds and training leaves out, `number_field` an answer that was a number."""

    number: int
    shape: RowShape
    examples: tuple[Example, ...]
    ignored: tuple[str, ...] = ()
    number_field: str | None = None


class _TwiceError(ValueError):
    """A key stands twice in one JSON object."""


def parse_line(line: str, number: int) -> list[Example]:
    """The examples of one JSON line. Raises LineError."""
    return list(read_line(line, number).examples)


def read_line(line: str, number: int) -> ParsedLine:
    """One JSON line, its shape and its examples. Raises LineError."""
    return read_row(parse_object(line, number), number)


def parse_object(text: str, number: int) -> dict[str, Any]:
    """A row's JSON. Raises LineError for what is no JSON object, or one with a key that is given twice."""
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg} at column {error.colno}"
        if "\r" in text.strip():
            reason = "line ends of old Macs (CR alone), which JSON lines do not have; `tr '\\r' '\\n' < FILE > NEW`"
        elif text.lstrip()[:1] == "[":
            reason += "; a JSON array is not JSONL: put one object on each line"
        raise LineError(number, "line", reason) from None
    except _TwiceError as error:
        raise LineError(number, str(error), "given twice in one object; keep one") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, a tower of brackets
        raise LineError(number, "line", f"JSON that cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise LineError(number, "line", f"expected a JSON object, got {kind_of(row)}")
    return row


def read_row(row: Mapping[str, Any], number: int, fields: Fields | None = None, chat: bool = False) -> ParsedLine:
    """The shape and the examples of a row; null means absent. Raises LineError.

    `fields` renames columns first. With `chat`, an Alpaca row is a conversation whatever stands in it.
    """
    given = {key: value for key, value in row.items() if value is not None}
    given = _renamed(given, fields, number) if fields else given
    refuse_foreign(given, number)
    shape = _shape(given, number)
    of_turns = shape in (RowShape.COMPLETION, RowShape.PREFERENCE_TEXT) and isinstance(given.get("prompt"), list)
    if not (of_turns or shape in (RowShape.MESSAGES, RowShape.PREFERENCE)):
        _refuse_tools(given, number, shape)
    if shape.is_preference:
        return _preference(read_pair(given, number), number)
    if shape is RowShape.ALPACA:
        return _alpaca(given, number, chat)
    if shape is RowShape.COMPLETION:
        if of_turns:
            return _trl(given, number)
        return _completion(given, _answer_field(given, number), number)
    field = "messages" if shape is RowShape.MESSAGES else "conversations"
    return _conversation(given, (), field, number, shape)


def has_context(row: Mapping[str, Any]) -> bool:
    """Whether something stands before the turns of a row."""
    return any(not blank(row.get(field)) for field in BEFORE)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise _TwiceError(name_of(key))
    return made


def _renamed(row: dict[str, Any], fields: Fields, number: int) -> dict[str, Any]:
    """The row with its columns under our names."""
    taken = {column: field for field, column in fields.items()}
    for field, column in fields.items():
        if field in row and field not in taken:
            here = "given beside" if column in row else "given, but fields name a column that is not here,"
            raise LineError(number, name_of(field), f"{here} {name_of(column)}, which stands for it; keep one")
    return {taken.get(key, key): value for key, value in row.items()}


def _shape(row: dict[str, Any], number: int) -> RowShape:
    fits = _fits(row)
    if len(fits) == 1:
        return fits[0]
    if fits:
        both = " and ".join(fits)
        raise LineError(number, "line", f"fits {both} at once; keep the fields of one shape")
    by_name = {key.strip().lower(): key for key in row}
    if near := _fits(by_name):
        wrong = [(by_name[name], name) for names in REQUIRED[near[0]] for name in names if name in by_name]
        key, name = next(pair for pair in wrong if pair[0] != pair[1])
        mapping = ",".join(f"{name}={name_of(key)}" for key, name in wrong if key != name)
        reason = f"the name should be {name!r}, without spaces or capitals; rename it, or `--fields '{mapping}'`"
        raise LineError(number, repr(name_of(key)), reason)
    by_first = sorted(REQUIRED.items(), key=lambda item: item[1][0][0] not in row)  # what begins as that shape does
    for shape, fields in by_first:
        missing = [names for names in fields if not any(name in row for name in names)]
        if len(missing) < len(fields):
            name = " or ".join(missing[0])
            reason = f"missing or null: a line with {names_of(row)} also needs {name} ({shape})"
            raise LineError(number, missing[0][0], f"{reason}; {_mapping(shape)}")
    known = "messages; prompt and completion; instruction and output; conversations; prompt, chosen and rejected"
    raise LineError(number, "line", f"no known shape in {names_of(row)}; give one of: {known}; {_mapping()}")


def _fits(row: Mapping[str, Any]) -> list[RowShape]:
    return [s for s, fields in REQUIRED.items() if all(any(name in row for name in names) for names in fields)]


def _mapping(shape: RowShape = RowShape.COMPLETION) -> str:
    names = "instruction=A,input=B,output=C" if shape is RowShape.ALPACA else "prompt=A,completion=B"
    if shape is RowShape.PREFERENCE_TEXT:
        names = "prompt=A,chosen=B,rejected=C"
    return f"or name your columns: `--fields {names}` (in a spec: data.fields)"


def _refuse_tools(row: dict[str, Any], number: int, shape: RowShape) -> None:
    if not blank(row.get("tools")):
        reason = (
            f"not supported in {shape} rows, and leaving it out would train another task; write the row as messages"
        )
        raise LineError(number, "tools", reason)


def _before(row: dict[str, Any], number: int) -> list[Message]:
    """What `system` and `history` put before the turns."""
    messages: list[Message] = []
    systems = [field for field in SYSTEM if not blank(row.get(field))]
    if len(systems) > 1:
        raise LineError(number, systems[1], f"given beside {systems[0]}; keep one of the two")
    if systems:
        messages.append({"role": "system", "content": text_of(row[systems[0]], systems[0], number)})
    return messages if blank(row.get("history")) else [*messages, *read_history(row["history"], number)]


def _completion(row: dict[str, Any], answer: str, number: int, shape: RowShape = RowShape.COMPLETION) -> ParsedLine:
    for field in ("history", "instruction", "input"):
        if not blank(row.get(field)):
            raise LineError(number, field, f"not used beside prompt and {answer}; put it into the prompt")
    prompt = text_of(row["prompt"], "prompt", number, needed=True)
    completion, was_number = _answer(row[answer], answer, number)
    example = Example((*_before(row, number), {"role": "user", "content": prompt}), completion, number)
    return ParsedLine(number, shape, (example,), _extra(row, "prompt", answer), answer if was_number else None)


def _trl(row: dict[str, Any], number: int) -> ParsedLine:
    """Turns to answer and turns to learn, each a list; what assistants say in the first is context."""
    answer = _answer_field(row, number)
    if not isinstance(row[answer], list):
        raise LineError(number, answer, f"expected a list of turns as in prompt, got {kind_of(row[answer])}")
    prompt = read_turns(row["prompt"], "prompt", number)
    context = tuple(turn.message for turn in prompt)
    ignored = tuple(f"prompt[].{name}" for turn in prompt for name in turn.ignored)
    return _conversation(row, context, answer, number, RowShape.MESSAGES, ("prompt",), ignored)


def _preference(pair: Pair, number: int) -> ParsedLine:
    """An example of the better answer, which knows the worse one."""
    better, worse = (_side(pair, field, number) for field in pair.fields)
    (good,), (bad,) = better.examples, worse.examples
    if (good.completion, good.answer) == (bad.completion, bad.answer):
        reason = f"the same as {pair.fields[0]}, so there is nothing to prefer; remove the row"
        raise LineError(number, pair.fields[1], reason)
    ignored = tuple(sorted({*better.ignored, *worse.ignored, *pair.ignored}))
    number_field = better.number_field or worse.number_field
    return ParsedLine(number, better.shape, (replace(good, rejected=bad),), ignored, number_field)


def _side(pair: Pair, field: str, number: int) -> ParsedLine:
    """The row as it would be with one of its answers alone."""
    row = {**pair.shared, field: pair.answers[field]}
    if isinstance(pair.prompt, str):
        return _completion({**row, "prompt": pair.prompt}, field, number, RowShape.PREFERENCE_TEXT)
    one_turn(row[field], field, number)
    prompt = read_turns(pair.prompt, pair.prompt_field, number)
    context = tuple(turn.message for turn in prompt)
    ignored = tuple(f"{pair.prompt_field}[].{name}" for turn in prompt for name in turn.ignored)
    return _conversation(row, context, field, number, RowShape.PREFERENCE, (pair.prompt_field,), ignored)


def _alpaca(row: dict[str, Any], number: int, chat: bool) -> ParsedLine:
    instruction = text_of(row["instruction"], "instruction", number, needed=True)
    given = text_of(row["input"], "input", number) if "input" in row else ""
    completion, was_number = _answer(row["output"], "output", number)
    before = _before(row, number)
    shape = RowShape.MESSAGES if chat or before else RowShape.ALPACA
    messages: list[Message]
    if shape is RowShape.MESSAGES:
        question = f"{instruction}\n{given}" if given.strip() else instruction
        messages = [*before, {"role": "user", "content": question}]
    elif given.strip():
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": given}]
    else:
        messages = [{"role": "user", "content": instruction}]
    extra = _extra(row, "instruction", "input", "output")
    example = Example(tuple(messages), completion, number)
    return ParsedLine(number, shape, (example,), extra, "output" if was_number else None)


def _conversation(
    row: dict[str, Any],
    context: tuple[Message, ...],
    field: str,
    number: int,
    shape: RowShape,
    used: tuple[str, ...] = (),
    unused: tuple[str, ...] = (),
) -> ParsedLine:
    turns = read_turns(row[field], field, number, sharegpt=shape is RowShape.SHAREGPT)
    before, first = _before(row, number), context[0] if context else turns[0].message
    if before and before[0]["role"] == first["role"] == "system":
        raise LineError(number, "system", "given, and the turns begin with a system turn as well; keep one of the two")
    tools, parallel = read_tools(row.get("tools"), number), row.get("parallel_tool_calls", True)
    if not isinstance(parallel, bool):
        raise LineError(number, "parallel_tool_calls", f"expected true or false, got {kind_of(parallel, show=True)}")
    conversation = Conversation(tools, parallel, number)
    for index, message in enumerate(context):
        conversation.accept(message, f"{used[0]}[{index}]")
    messages = [*before, *context]
    ignored = {*_extra(row, field, *used, "tools", "parallel_tool_calls"), *unused}
    examples: list[Example] = []
    for index, turn in enumerate(turns):
        conversation.accept(turn.message, f"{field}[{index}]")
        ignored |= {f"{field}[].{name}" for name in turn.ignored}
        if turn.message["role"] == "assistant":
            if not any(before["content"].strip() for before in messages):
                reason = "an answer with nothing before it: there is no prompt to answer"
                raise LineError(number, f"{field}[{index}]", reason)
            if turn.learnt:
                answer = turn.message if len(turn.message) > 2 else None
                examples.append(Example(tuple(messages), turn.message["content"], number, tools, answer))
        messages.append(turn.message)
    if not examples:
        raise LineError(number, field, "no assistant turn to learn from")
    if messages[-1]["role"] != "assistant":
        ignored.add(f"{field}: turns after the last answer")
    return ParsedLine(number, shape, tuple(examples), tuple(sorted(ignored)))


def _answer_field(row: dict[str, Any], number: int) -> str:
    if "completion" in row and "response" in row:
        raise LineError(number, "response", "given beside completion; keep one of the two")
    return "completion" if "completion" in row else "response"


def _answer(value: Any, where: str, number: int) -> tuple[str, bool]:
    """An answer's text, and whether it was written as an integer: a label, meant as its digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), True
    return text_of(value, where, number), False


def _extra(row: dict[str, Any], *known: str) -> tuple[str, ...]:
    """What the row says beside `known` and nobody reads; a weight that is left is 1."""
    known = (*known, *BEFORE, "weight")
    return tuple(sorted(name_of(key) for key, value in row.items() if key not in known and not blank(value)))
