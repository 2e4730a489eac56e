"""Reads a request's body within limits of size and time, validates it, and reports all mistakes at once."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from pedro.errors import PedroError
from pedro.gateway.errors import PayloadTooLargeError, RequestTimeoutError
from pedro.gateway.schemas import Body

if TYPE_CHECKING:
    from fastapi import Request

MAX_ITEMS = 4096  # of a list of objects, such as messages
MAX_SHOWN_VALUE = 80
MAX_SHOWN_ERRORS = 5
MAX_LISTED_ERRORS = 1000  # each costs memory and time, even if not shown

Model = TypeVar("Model", bound=Body)


async def read_body(request: Request) -> bytes:
    """Raises PayloadTooLargeError as soon as the limit is exceeded, RequestTimeoutError if the body is too slow."""
    settings = request.app.state.settings
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise RequestTimeoutError(f"The request body did not arrive within {settings.body_timeout_s:g} s.") from None
    return bytes(body)


def _too_large(limit: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(f"The request body is larger than {limit} bytes.")


def parse(kind: type[Model], body: bytes) -> Model:
    """The request in `body`. Raises PedroError (400) naming each invalid field, its value and what was expected."""
    from pydantic_core import from_json

    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise PedroError(f"The request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise PedroError("The request body must be a JSON object.", code="invalid_json")
    _drop_harmless(kind, value, "")
    for name, part in kind.parts.items():
        given = value.get(name)
        if isinstance(given, dict):
            _drop_harmless(part, given, f"{name}.")
        elif isinstance(given, list):
            if len(given) > MAX_ITEMS:
                message = f"{name}: expected at most {MAX_ITEMS} items, got {len(given)}"
                raise PedroError(message, param=name, code="invalid_value")
            for number, item in enumerate(given):
                if isinstance(item, dict):
                    _drop_harmless(part, item, f"{name}[{number}].")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _user_error(error, kind) from None


def _drop_harmless(kind: type[Body], value: dict[str, Any], prefix: str) -> None:
    for name in kind.harmless.keys() & value.keys():
        given = value.pop(name)
        if given is not None and not any(type(given) is type(ok) and given == ok for ok in kind.harmless[name]):
            field = prefix + name
            reason = f"; {kind.reasons[name]}" if name in kind.reasons else ""
            message = f"{field}: not supported, got {shown(given)}{reason}"
            raise PedroError(message, param=field, code="unsupported_parameter")


_EXPECTED: dict[str, Callable[[dict[str, Any]], str]] = {
    "missing": lambda _ctx: "is required",
    "int_type": lambda _ctx: "expected a whole number",
    "float_type": lambda _ctx: "expected a number",
    "string_type": lambda _ctx: "expected a string",
    "bool_type": lambda _ctx: "expected true or false",
    "list_type": lambda _ctx: "expected a list",
    "dict_type": lambda _ctx: "expected an object",
    "model_type": lambda _ctx: "expected an object",
    "literal_error": lambda ctx: "expected " + ctx["expected"].replace("'", '"'),
    "value_error": lambda ctx: str(ctx["error"]),
    "greater_than_equal": lambda ctx: f"expected >= {ctx['ge']}",
    "greater_than": lambda ctx: f"expected > {ctx['gt']}",
    "less_than_equal": lambda ctx: f"expected <= {ctx['le']}",
    "less_than": lambda ctx: f"expected < {ctx['lt']}",
    "too_long": lambda ctx: f"expected at most {ctx['max_length']} items",
    "too_short": lambda ctx: f"expected at least {ctx['min_length']} items",
}


def _user_error(error: ValidationError, kind: type[Body]) -> PedroError:
    if error.error_count() > MAX_LISTED_ERRORS:
        message = f"The request body has {error.error_count():,} mistakes, too many to list."
        return PedroError(message, code="invalid_value")
    problems = error.errors(include_url=False)
    lines = []
    for problem in problems[:MAX_SHOWN_ERRORS]:
        field = _field(problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"Unrecognized request argument supplied: {field}{_nearest(kind, problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{field}: is required")
        else:
            describe = _EXPECTED.get(problem["type"])
            expected = describe(problem.get("ctx", {})) if describe else problem["msg"]
            lines.append(f"{field}: {expected}, got {shown(problem['input'])}")
    if len(problems) > MAX_SHOWN_ERRORS:
        lines.append(f"and {len(problems) - MAX_SHOWN_ERRORS} more")
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
    return PedroError(
        "; ".join(lines),
        param=_field(problems[0]["loc"]),
        code=codes.get(problems[0]["type"], "invalid_value"),
    )


def _nearest(kind: type[Body], location: tuple[int | str, ...]) -> str:
    """A suggestion of the known field that an unknown one may stand for."""
    for part in location[:-1]:
        if isinstance(part, str):
            kind = kind.parts.get(part, kind)
    known = [*kind.model_fields, *kind.harmless]
    close = difflib.get_close_matches(str(location[-1])[:64], known, n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def _field(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") is "messages[0].content"."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def shown(value: Any) -> str:
    """A value in an error message, as JSON, the way the client wrote it."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= MAX_SHOWN_VALUE else text[: MAX_SHOWN_VALUE - 3] + "..."
