"""Tools, calls of them and their results, as OpenAI's chat rows hold them.

Reference: https://platform.openai.com/docs/guides/function-calling and .../fine-tuning (`tools` of a training row).
Nothing of them is left out in silence: what is not understood raises a LineError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pedro.data.mistakes import LineError, blank, kind_of, name_of, text_of

Tool = dict[str, Any]
Message = dict[str, Any]
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
FUNCTION = "function"
FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


def read_tools(value: Any, line: int) -> tuple[Tool, ...]:
    """The tools of a row: a list, or the JSON of one, as tables hold it. Raises LineError."""
    if blank(value):
        return ()
    tools = _json(value, "tools", line) if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise LineError(line, "tools", f"expected a list of tools, got {kind_of(tools)}")
    read = tuple(_tool(tool, f"tools[{index}]", line) for index, tool in enumerate(tools))
    names = [tool[FUNCTION]["name"] for tool in read]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise LineError(line, "tools", f"two of them are named {twice}; rename one")
    return read


def read_calls(value: Any, where: str, line: int) -> list[dict[str, Any]]:
    """The calls of an assistant's turn, their arguments as objects: so chat templates want them. Raises LineError."""
    if not isinstance(value, list):
        raise LineError(line, where, f"expected a list of calls, got {kind_of(value)}")
    return [_call(call, f"{where}[{index}]", line) for index, call in enumerate(value)]


class Conversation:
    """Follows the turns of a row: each result belongs to a call, and no call that another turn follows lacks one."""

    def __init__(self, tools: tuple[Tool, ...], parallel: bool, line: int) -> None:
        self._known = {tool[FUNCTION]["name"] for tool in tools}
        self._parallel, self._line = parallel, line
        self._open: dict[str, str] = {}  # name by id

    def accept(self, message: Message, where: str) -> None:
        """The next turn. Gives a result the name of what was called. Raises LineError."""
        if message["role"] == "tool":
            self._answered(message, where)
            return
        if self._open:
            waiting = ", ".join(name_of(call_id) for call_id in self._open)
            reason = f"the calls before it have no results yet ({waiting}); give a turn with role tool for each"
            raise LineError(self._line, where, reason)
        calls = message.get("tool_calls", ())
        if len(calls) > 1 and not self._parallel:
            raise LineError(self._line, f"{where}.tool_calls", "several calls, but parallel_tool_calls is false")
        for index, call in enumerate(calls):
            at, name = f"{where}.tool_calls[{index}]", call[FUNCTION]["name"]
            if self._known and name not in self._known:
                raise LineError(self._line, f"{at}.function.name", f"{name!r} is none of the row's tools")
            if call["id"] in self._open:
                raise LineError(self._line, f"{at}.id", f"{name_of(call['id'])}: two calls of one turn have this id")
            self._open[call["id"]] = name

    def _answered(self, message: Message, where: str) -> None:
        call_id = message["tool_call_id"]
        if call_id not in self._open:
            reason = f"{name_of(call_id)}: no call with this id waits for a result here"
            raise LineError(self._line, f"{where}.tool_call_id", reason)
        called = self._open.pop(call_id)
        if message.setdefault("name", called) != called:
            raise LineError(self._line, f"{where}.name", f"the call with this id is of {called}")


def _tool(tool: Any, where: str, line: int) -> Tool:
    given = _object(tool, where, line)
    if given.get("type") != FUNCTION:
        raise LineError(line, f"{where}.type", f'expected "{FUNCTION}", got {kind_of(given.get("type"), show=True)}')
    function = _object(given.get(FUNCTION), f"{where}.{FUNCTION}", line)
    _only(given, ("type", FUNCTION), where, line)
    _only(function, FUNCTION_FIELDS, f"{where}.{FUNCTION}", line)
    _name(function.get("name"), f"{where}.{FUNCTION}.name", line)
    if function.get("description") is not None:
        text_of(function["description"], f"{where}.{FUNCTION}.description", line)
    if function.get("parameters") is not None:
        _object(function["parameters"], f"{where}.{FUNCTION}.parameters", line)
    _utf8(function, f"{where}.{FUNCTION}", line)
    kept = {name: function[name] for name in FUNCTION_FIELDS if function.get(name) is not None}
    return {"type": FUNCTION, FUNCTION: kept}


def _call(call: Any, where: str, line: int) -> dict[str, Any]:
    given = {key: value for key, value in _object(call, where, line).items() if value is not None}
    if given.get("type", FUNCTION) != FUNCTION:
        raise LineError(line, f"{where}.type", f'expected "{FUNCTION}", got {kind_of(given["type"], show=True)}')
    _only(given, ("id", "type", "index", FUNCTION), where, line)
    function = _object(given.get(FUNCTION), f"{where}.{FUNCTION}", line)
    _only(function, ("name", "arguments"), f"{where}.{FUNCTION}", line)
    return {
        "id": text_of(given.get("id"), f"{where}.id", line, needed=True),
        "type": FUNCTION,
        FUNCTION: {
            "name": _name(function.get("name"), f"{where}.{FUNCTION}.name", line),
            "arguments": _arguments(function.get("arguments"), f"{where}.{FUNCTION}.arguments", line),
        },
    }


def _arguments(value: Any, where: str, line: int) -> dict[str, Any]:
    """What a call hands over: OpenAI's text of a JSON object, or the object itself."""
    given = _json(value, where, line) if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise LineError(line, where, f"expected the text of a JSON object, got {kind_of(given)}")
    _utf8(given, where, line)
    return given


def _json(text: str, where: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineError(line, where, f"not JSON: {str(error)[:80]}") from None


def _utf8(value: Any, where: str, line: int) -> None:
    """Raise LineError for half surrogates anywhere in a JSON value."""
    try:
        text_of(json.dumps(value, ensure_ascii=False), where, line)
    except RecursionError:
        raise LineError(line, where, "nested too deeply") from None


def _object(value: Any, where: str, line: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise LineError(line, where, f"expected an object, got {kind_of(value)}")
    return value


def _only(given: Mapping[str, Any], known: tuple[str, ...], where: str, line: int) -> None:
    for key, value in given.items():
        if key not in known and not blank(value):
            raise LineError(line, f"{where}.{name_of(key)}", f"not known here; known: {', '.join(known)}")


def _name(value: Any, where: str, line: int) -> str:
    name = text_of(value, where, line, needed=True)
    if not NAME.fullmatch(name):
        raise LineError(line, where, f"expected 1 to 64 letters, digits, '_' and '-', got {name[:40]!r}")
    return name
