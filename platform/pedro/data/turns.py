"""Turns lists of turns into messages, whatever the roles are called in the wild.

A turn is {"role", "content"} or ShareGPT's {"from", "value"}, in any list of turns. Null means absent. OpenAI's turns
may hold `name`, an assistant's `tool_calls`, and be a tool's result; other forms of tool calls are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pedro.data.mistakes import LineError, blank, kind_of, name_of, text_of
from pedro.data.tool_calls import Message, read_calls

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "ai", "bot", "model"), "assistant"),
}
TOOL = "tool"
TOOL_ROLES = (
    "tool", "tool_call", "tool_response", "function", "function_call", "function_response", "observation", "ipython",
)  # fmt: skip
OTHER_FORMS = "tool calls are read in OpenAI's form alone: tools, tool_calls, and role tool with a tool_call_id"
LEARNING = ("train", "training", "loss")  # how other trainers say in a turn whether it is learnt from
NOT_SAID = ("audio", "refusal")  # of OpenAI's messages: what is answered there, but not as text


@dataclass(frozen=True)
class Turn:
    """One message; `learnt` says whether an assistant's turn is an answer to learn. `ignored` names unused fields."""

    message: Message
    learnt: bool
    ignored: tuple[str, ...]


def read_turns(turns: Any, field: str, line: int, sharegpt: bool = False) -> list[Turn]:
    """The turns of a list. Raises LineError."""
    if not isinstance(turns, list) or not turns:
        raise LineError(line, field, f"expected a list of turns, got {kind_of(turns, empty=True)}")
    return [_turn(turn, f"{field}[{index}]", line, sharegpt) for index, turn in enumerate(turns)]


def read_history(value: Any, line: int) -> list[Message]:
    """`history`: earlier questions and answers as pairs, as Alpaca files carry them. Context only, never learnt."""
    if not isinstance(value, list):
        raise LineError(line, "history", f"expected a list of [question, answer] pairs, got {kind_of(value)}")
    messages = []
    for index, pair in enumerate(value):
        where = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise LineError(line, where, "expected a pair [question, answer]")
        messages.append({"role": "user", "content": text_of(pair[0], f"{where}[0]", line)})
        messages.append({"role": "assistant", "content": text_of(pair[1], f"{where}[1]", line)})
    return messages


def _turn(turn: Any, where: str, line: int, sharegpt: bool) -> Turn:
    if not isinstance(turn, dict):
        wanted = "from and value" if sharegpt else "role and content"
        raise LineError(line, where, f"expected an object with {wanted}, got {kind_of(turn)}")
    given = {key: value for key, value in turn.items() if value is not None}
    who, what = _keys(given, where, line, sharegpt)
    role = _role(given.get(who), f"{where}.{who}", line, who == "role")
    if not blank(given.get("function_call")):
        raise LineError(line, f"{where}.function_call", OTHER_FORMS)
    for key in NOT_SAID:
        if not blank(given.get(key)):
            raise LineError(line, f"{where}.{key}", "not supported, and leaving it out would train another answer")
    for key in LEARNING:
        if key in given and given[key] is not True:
            raise LineError(line, f"{where}.{key}", "not known here; `weight: 0` keeps a turn from being learnt")
    weight = given.get("weight", 1)
    if weight not in (0, 1):
        raise LineError(line, f"{where}.weight", f"expected 0 or 1, got {weight!r:.40}")
    used = (who, what, "weight", "name", "tool_calls", "tool_call_id")
    unused = tuple(name_of(key) for key, value in given.items() if key not in used and not blank(value))
    return Turn(_message(given, role, given.get(what), where, f"{where}.{what}", line), weight == 1, unused)


def _message(given: dict[str, Any], role: str, content: Any, where: str, at: str, line: int) -> Message:
    """What formats are told of a turn: role and content, and what else of OpenAI's fields it has."""
    message: Message = {"role": role, "content": ""}
    if not blank(given.get("tool_calls")):
        if role != "assistant":
            raise LineError(line, f"{where}.tool_calls", f"only assistants call tools, this is {role}")
        message["tool_calls"] = read_calls(given["tool_calls"], f"{where}.tool_calls", line)
    if content is not None or "tool_calls" not in message:
        message["content"] = _content(content, at, line)
    if not blank(given.get("name")):
        message["name"] = text_of(given["name"], f"{where}.name", line)
    if role == TOOL:
        message["tool_call_id"] = text_of(given.get("tool_call_id"), f"{where}.tool_call_id", line, needed=True)
    elif not blank(given.get("tool_call_id")):
        raise LineError(line, f"{where}.tool_call_id", f"is only for a tool's result, this is {role}")
    return message


def _keys(turn: dict[str, Any], where: str, line: int, sharegpt: bool) -> tuple[str, str]:
    """Under which names a turn holds its role and its text."""
    names, others = ("role", "content"), ("from", "value")
    if any(key in turn for key in names) and any(key in turn for key in others):
        raise LineError(line, where, "holds role or content, and from or value; keep one of the two forms")
    if sharegpt:
        names, others = others, names
    return others if any(key in turn for key in others) else names


def _role(role: Any, where: str, line: int, openai: bool) -> str:
    known = role.strip().lower() if isinstance(role, str) else ""
    if known == TOOL and openai:
        return TOOL
    if known in TOOL_ROLES:
        raise LineError(line, where, f"{known}: {OTHER_FORMS}")
    if known not in ROLES:
        raise LineError(line, where, f"expected one of {', '.join(ROLES)}; got {kind_of(role, show=True)}")
    return ROLES[known]


def _content(content: Any, where: str, line: int) -> str:
    """Text, or the text parts of OpenAI's list form joined."""
    if not isinstance(content, list):
        return text_of(content, where, line)
    parts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise LineError(line, f"{where}[{index}]", 'only {"type": "text", "text": ...} parts are supported')
        parts.append(text_of(part.get("text"), f"{where}[{index}].text", line))
    return "".join(parts)
