"""Translates a request of /v1/responses into a chat: items become turns; errors name the original fields.

Reference: https://platform.openai.com/docs/api-reference/responses/create (`input`, `tools`, `tool_choice`, `text`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.gateway.parsing import MAX_ITEMS, shown
from pedro.gateway.response_fields import SAME
from pedro.gateway.schemas import ChatRequest

if TYPE_CHECKING:
    from pedro.gateway.response_fields import ResponsesRequest

ROLES = ("user", "assistant", "system", "developer")
KINDS = ("message", "function_call", "function_call_output")
TEXTS = ("input_text", "output_text")
TOOL_CHOICES = ("none", "auto", "required")
FIELDS = {
    "message": ("type", "role", "content", "id", "status", "phase"),
    "function_call": ("type", "call_id", "name", "arguments", "id", "status"),
    "function_call_output": ("type", "call_id", "output", "id", "status"),
}
AT_REST = {"defer_loading": False, "allowed_callers": ["direct"]}  # of a tool: values that match our behaviour
REMEDIES = {
    "item_reference": "responses are not stored here; send the item itself",
    "reasoning": "the models here do not reason; leave it out",
    "input_image": "prompts are text",
    "input_file": "prompts are text; send the file's content",
    "input_audio": "prompts are text",
}
RENAMED = (
    (re.compile(r"\bresponse_format\.json_schema\b"), "text.format"),
    (re.compile(r"\bresponse_format\b"), "text.format"),
    (re.compile(r"\bmax_(?:completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"\b(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\btool_call_id\b"), "call_id"),
)
TURN = re.compile(r"\bmessages(?:\[(\d+)\](?:\.tool_calls(?:\[(\d+)\](?:\.function)?)?)?)?")


class Translation:
    """`chat` is the translated request; `named` rewrites an error about it in terms of the original."""

    def __init__(self, request: ResponsesRequest) -> None:
        self._turns: list[dict[str, Any]] = []
        self._places: list[list[int]] = []  # per turn: the indices of its items, calls last
        if request.instructions:
            self._say("system", request.instructions, None)
        if isinstance(request.input, str):
            self._say("user", request.input, None)
        else:
            _check(0 < len(request.input) <= MAX_ITEMS, "input", f"expected 1 to {MAX_ITEMS} items", len(request.input))
            for place, item in enumerate(request.input):
                self._item(item, place)
        fields: dict[str, Any] = {name: getattr(request, name) for name in SAME if getattr(request, name) is not None}
        fields["messages"] = self._turns
        fields["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
        if request.max_output_tokens is not None:
            fields["max_completion_tokens"] = request.max_output_tokens
        if request.tools:
            fields["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(request.tools)]
        if request.tool_choice is not None:
            fields["tool_choice"] = _tool_choice(request.tool_choice)
        form = _response_format(request)
        if form is not None:
            fields["response_format"] = form
        self.chat = ChatRequest.model_validate(fields)  # all fields are checked or made here

    def named(self, error: PedroError) -> PedroError:
        """The error with field names of /v1/responses."""
        made = copy.copy(error)
        made.message = self._renamed(error.message)
        made.param = None if error.param is None else self._renamed(error.param)
        made.args = (made.message,)
        return made

    def _renamed(self, text: str) -> str:
        for pattern, name in RENAMED:
            text = pattern.sub(name, text)
        return TURN.sub(self._place, text)

    def _place(self, found: re.Match[str]) -> str:
        turn = int(found[1] or -1)
        places = self._places[turn] if 0 <= turn < len(self._places) else []
        if not places:
            return "input"
        return f"input[{places[int(found[2]) - len(self._turns[turn]['tool_calls'])] if found[2] else places[0]}]"

    def _item(self, item: Mapping[str, Any], place: int) -> None:
        where = f"input[{place}]"
        given = {name: value for name, value in item.items() if value is not None}
        kind = given.get("type", "message")
        if kind not in KINDS:
            raise _unsupported(f"{where}.type", kind, f"expected {', '.join(KINDS)}")
        for name in given:
            if name not in FIELDS[kind]:
                known = ", ".join(FIELDS[kind])
                message = f"{where}.{shown(name)[1:-1]}: unknown; known: {known}"
                raise PedroError(message, param=where, code="unknown_parameter")
        if kind == "message":
            role = given.get("role")
            _check(role in ROLES, f"{where}.role", f"expected {', '.join(ROLES)}", role)
            self._say(str(role), _text(given.get("content"), f"{where}.content"), place)
        elif kind == "function_call":
            call_id, name, arguments = (
                _string(given.get(field), f"{where}.{field}") for field in ("call_id", "name", "arguments")
            )
            function = {"name": name, "arguments": arguments}
            self._call({"id": call_id, "type": "function", "function": function}, place)
        else:
            turn = {"role": "tool", "tool_call_id": _string(given.get("call_id"), f"{where}.call_id")}
            self._turn({**turn, "content": _text(given.get("output"), f"{where}.output")}, place)

    def _say(self, role: str, text: str, place: int | None) -> None:
        last = self._turns[-1] if self._turns else {}
        if role == "assistant" and last.get("tool_calls"):  # text beside its calls
            last["content"] += text
        else:
            self._turn({"role": role, "content": text}, place)

    def _call(self, call: dict[str, Any], place: int) -> None:
        """The calls of one answer, and the text before them, are one turn of a chat."""
        if not self._turns or self._turns[-1]["role"] != "assistant":
            self._turn({"role": "assistant", "content": ""}, None)
        self._turns[-1].setdefault("tool_calls", []).append(call)
        self._places[-1].append(place)

    def _turn(self, turn: dict[str, Any], place: int | None) -> None:
        self._turns.append(turn)
        self._places.append([] if place is None else [place])


def _text(value: Any, where: str) -> str:
    """A text, or text parts concatenated."""
    if isinstance(value, str):
        return value
    _check(isinstance(value, list) and bool(value), where, "expected a string or a list of text parts", value)
    texts = []
    for number, part in enumerate(value):
        at = f"{where}[{number}]"
        _check(isinstance(part, dict), at, "expected an object", part)
        if part.get("type") not in TEXTS:
            raise _unsupported(f"{at}.type", part.get("type"), f"expected {' or '.join(TEXTS)}")
        texts.append(_string(part.get("text"), f"{at}.text"))
    return "".join(texts)


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool in the form of chats; `tool_fields` validates its content."""
    if tool.get("type") != "function":
        raise _unsupported(
            f"{where}.type", tool.get("type"), 'only functions that the client runs can be called; expected "function"'
        )
    function = {name: value for name, value in tool.items() if name != "type" and AT_REST.get(name) != value}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | Mapping[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str):
        _check(choice in TOOL_CHOICES, "tool_choice", f"expected {', '.join(TOOL_CHOICES)}, or a function", choice)
        return choice
    named = choice.keys() == {"type", "name"} and choice["type"] == "function" and isinstance(choice["name"], str)
    _check(named, "tool_choice", 'expected none, auto, required or {"type": "function", "name": …}', choice)
    return {"type": "function", "function": {"name": choice["name"]}}


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    form = None if request.text is None else request.text.format
    if form is None:
        return None
    if form.type != "json_schema":
        for name in ("name", "schema"):
            _check(getattr(form, name.replace("schema", "schema_")) is None, f"text.format.{name}", "needs json_schema")
        return {"type": form.type}
    given = {"name": form.name, "schema": form.schema_}
    for name, value in given.items():
        if value is None:
            message = f"text.format.{name}: is required with the type json_schema"
            raise PedroError(message, param=f"text.format.{name}", code="missing_required_parameter")
    return {"type": form.type, "json_schema": {**given, "strict": form.strict}}


def _string(value: Any, where: str) -> str:
    _check(isinstance(value, str), where, "expected a string", value)
    return str(value)


def _check(good: bool, where: str, expected: str, *got: Any) -> None:
    if not good:
        given = f", got {shown(got[0])}" if got else ""
        raise PedroError(f"{where}: {expected}{given}", param=where, code="invalid_value")


def _unsupported(where: str, given: Any, expected: str) -> PedroError:
    remedy = REMEDIES.get(given, expected) if isinstance(given, str) else expected
    message = f"{where}: not supported, got {shown(given)}; {remedy}"
    return PedroError(message, param=where, code="unsupported_parameter")
