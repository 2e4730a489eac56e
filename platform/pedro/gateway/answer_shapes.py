"""The shape of a request's answers: OpenAI's `response_format`, or `structured_outputs` of vLLM's server.

Only checks that need no tokenizer; the engine's replica checks whether a shape can be compiled.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.gateway.backend import AnswerShape

if TYPE_CHECKING:
    from pedro.gateway.schemas import AnswerFormat, SamplingFields, StructuredOutputs

MAX_CHARS = 100_000  # of one shape, as text
ANY_OBJECT = {"type": "object"}
_AT_REST = {
    "use_beam_search": "beam search does not support shapes",
    "ignore_eos": "the shape determines where an answer ends",
    "min_tokens": "the shape determines where an answer ends",
}


def answer_shape(request: SamplingFields) -> AnswerShape | None:
    """The shape; None if any text is allowed. Raises PedroError if it is contradictory, too large or not combinable."""
    form, outputs = request.response_format, request.structured_outputs
    if form is not None and form.type == "text":
        form = None
    if form is not None and outputs is not None:
        raise PedroError(
            "structured_outputs: not together with response_format; send one of them", param="structured_outputs"
        )
    if form is not None:
        shape = _of_format(form)
    elif outputs is not None:
        shape = _of_outputs(outputs)
    else:
        return None
    if len(shape.text) > MAX_CHARS:
        raise PedroError(
            f"{shape.param}: expected at most {MAX_CHARS:,} characters, got {len(shape.text):,}", param=shape.param
        )
    check_beside(request, shape.param.partition(".")[0])
    return shape


def check_beside(request: SamplingFields, field: str) -> None:
    """Raise PedroError for fields that cannot be combined with a shape, which `field` requests."""
    for name, reason in _AT_REST.items():
        if getattr(request, name):
            raise PedroError(f"{name}: not together with {field}, since {reason}; leave one out", param=name)


def _of_format(form: AnswerFormat) -> AnswerShape:
    if form.type == "json_object":
        return _json(ANY_OBJECT, "response_format")
    if form.json_schema is None:
        raise PedroError(
            "response_format.json_schema: is required with the type json_schema",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    return _json(form.json_schema.schema_, "response_format.json_schema.schema")


def _of_outputs(outputs: StructuredOutputs) -> AnswerShape:
    given: dict[str, Any] = outputs.model_dump(by_alias=True, exclude_none=True)
    if given.get("json_object") is False:
        del given["json_object"]
    if len(given) != 1:
        told = ", ".join(given) or "none"
        raise PedroError(
            f"structured_outputs: expected one of json, json_object, regex, choice and grammar, got {told}",
            param="structured_outputs",
        )
    [(kind, value)] = given.items()
    param = f"structured_outputs.{kind}"
    if kind == "json_object":
        return _json(ANY_OBJECT, param)
    if kind == "json":
        return _json(_parsed(value, param) if isinstance(value, str) else value, param)
    return AnswerShape(kind, json.dumps(value) if kind == "choice" else value, param)


def _json(schema: Any, param: str) -> AnswerShape:
    return AnswerShape("json", json.dumps(schema, separators=(",", ":")), param)


def _parsed(text: str, param: str) -> Any:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise PedroError(f"{param}: expected a JSON schema, an object or one written as text", param=param)
    return schema
