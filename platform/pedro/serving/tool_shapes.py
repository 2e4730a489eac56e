"""The shape of an answer that must call tools: a grammar in the syntax of the prompt format's family."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pedro.data.call_syntax import CallSyntax, syntax_of
from pedro.data.tool_calls import FUNCTION
from pedro.errors import PedroError
from pedro.gateway.backend import AnswerShape
from pedro.serving.shape_worker import OPTIONS

if TYPE_CHECKING:
    from pedro.gateway.backend import ToolUse

MORE_CALLS = 7  # after the first: otherwise a model may call forever
NO_ARGUMENTS = {"type": "object", "additionalProperties": False}


def call_shape(template: str, use: ToolUse) -> AnswerShape | None:
    """The shape; None if calls are optional. Raises PedroError if the format's calls are unknown or cannot be
    required."""
    if not use.may_call:
        return None
    syntax = syntax_of(template)
    if syntax is None:
        raise PedroError(
            "tools: the call syntax of the model's prompt format is not supported here; leave them out, or send "
            "tool_choice none",
            param="tools",
            code="unsupported_parameter",
        )
    if use.must_call is None:
        return None
    if not syntax.writable:
        raise PedroError(
            f"tool_choice: calls in the syntax of {syntax.name} cannot be required; send auto",
            param="tool_choice",
            code="unsupported_parameter",
        )
    return AnswerShape("grammar", _grammar(syntax, use), "tools")


def _grammar(syntax: CallSyntax, use: ToolUse) -> str:
    functions = [tool[FUNCTION] for tool in use.tools if use.must_call in ("", tool[FUNCTION]["name"])]
    rules = []
    for number, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"])}, "{syntax.arguments}": '
        schema: dict[str, Any] = {"type": "object", **(function.get("parameters") or NO_ARGUMENTS)}
        rules.append(f'call_{number}: {json.dumps(head)} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps({**schema, 'x-guidance': OPTIONS})}")
    calls = " | ".join(f"call_{number}" for number in range(len(functions)))
    between = ", " if syntax.listed else f"{syntax.after}\n{syntax.before}"
    more = f" ({json.dumps(between)} call){{0,{MORE_CALLS}}}" if use.parallel and syntax.several else ""
    frame = [json.dumps(syntax.before)] if syntax.before else []
    start = " ".join([*frame, f"call{more}", *([json.dumps(syntax.after)] if syntax.after else [])])
    return "\n".join([f"start: {start}", f"call: {calls}", *rules])
