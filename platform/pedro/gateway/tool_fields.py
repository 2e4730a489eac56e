"""Tools of a chat request: which may or must be called, and the turns with calls and their results.

Reference: https://platform.openai.com/docs/api-reference/chat/create (`tools`, `tool_choice`, `parallel_tool_calls`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pedro.data.mistakes import LineError
from pedro.data.tool_calls import FUNCTION, Conversation, read_calls, read_tools
from pedro.errors import PedroError
from pedro.gateway.answer_shapes import MAX_CHARS, check_beside
from pedro.gateway.backend import ToolUse

if TYPE_CHECKING:
    from pedro.gateway.schemas import ChatRequest, Message

MAX_TOOLS = 128


def tool_use(request: ChatRequest) -> ToolUse | None:
    """The request's use of tools; None if there are none. Raises PedroError naming the field."""
    choice = request.tool_choice
    if not request.tools:
        if choice not in (None, "none", "auto"):
            raise PedroError("tool_choice: there are no tools to call; send tools", param="tool_choice")
        return None
    if len(request.tools) > MAX_TOOLS:
        raise PedroError(f"tools: expected at most {MAX_TOOLS}, got {len(request.tools)}", param="tools")
    written = len(json.dumps(request.tools))
    if written > MAX_CHARS:
        raise PedroError(f"tools: expected at most {MAX_CHARS:,} characters, got {written:,}", param="tools")
    try:
        tools = read_tools(request.tools, 0)
    except LineError as error:
        raise PedroError(f"{error.field}: {error.reason}", param=error.field) from None
    must_call = _must_call(choice, [tool[FUNCTION]["name"] for tool in tools])
    form = request.response_format
    if choice != "none" and (request.structured_outputs is not None or (form is not None and form.type != "text")):
        field = "structured_outputs" if request.structured_outputs is not None else "response_format"
        raise PedroError(
            f"{field}: not together with tools that may be called; leave one out, or send tool_choice none", param=field
        )
    if must_call is not None:
        check_beside(request, "tool_choice")
    return ToolUse(tools, choice != "none", must_call, request.parallel_tool_calls is not False)


def tool_messages(messages: Sequence[Message]) -> tuple[Mapping[str, Any], ...]:
    """Messages with calls and results, for prompt formats. Raises PedroError if a result has no call or vice versa."""
    conversation = Conversation((), True, 0)
    made: list[dict[str, Any]] = []
    try:
        for index, message in enumerate(messages):
            where = f"messages[{index}]"
            made.append(_message(message, where))
            conversation.accept(made[-1], where)
    except LineError as error:
        raise PedroError(f"{error.field}: {error.reason}", param=error.field) from None
    return tuple(made)


def _message(message: Message, where: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": message.content}
    if message.tool_calls:
        if role != "assistant":
            raise LineError(0, f"{where}.tool_calls", f"only assistants call tools, this is {role}")
        made["tool_calls"] = read_calls(message.tool_calls, f"{where}.tool_calls", 0)
    if (role == "tool") != bool(message.tool_call_id):
        reason = "is required for a tool's result" if role == "tool" else f"is only for a tool's result, this is {role}"
        raise LineError(0, f"{where}.tool_call_id", reason)
    if role == "tool":
        made["tool_call_id"] = message.tool_call_id
    return made


def _must_call(choice: Any, names: list[str]) -> str | None:
    """Which tool must be called: "" for any of them, None for none."""
    if choice in (None, "none", "auto"):
        return None
    if choice == "required":
        return ""
    function = choice.get(FUNCTION) if isinstance(choice, dict) and choice.get("type") == FUNCTION else None
    name = function.get("name") if isinstance(function, dict) and len(function) == 1 and len(choice) == 2 else None
    if name is None:
        expected = 'none, auto, required or {"type": "function", "function": {"name": …}}'
        raise PedroError(f"tool_choice: expected {expected}", param="tool_choice")
    if name not in names:
        raise PedroError(f"tool_choice: {name!r:.80} is not one of the tools", param="tool_choice")
    return str(name)
