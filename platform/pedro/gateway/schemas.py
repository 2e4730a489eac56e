"""The bodies of OpenAI's text requests: what is read, with which bounds, and what is refused. Knows nothing of models.

Every field that OpenAI documents is recognised. One that cannot be honoured is refused by name unless it asks for
what happens anyway; an unknown one is refused by name too: no setting is dropped in silence. Fields OpenAI does not
have (`top_k`, `conditioning_length`, ...) are marked as extensions; the `openai` client sends them by `extra_body`.
Reference: https://platform.openai.com/docs/api-reference/completions and .../chat
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pedro.errors import PedroError

MAX_MESSAGES = 4096
MAX_SHOWN_VALUE = 80
MAX_SHOWN_ERRORS = 5
INT64 = 2**63


def _stop(value: Any) -> Any:
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("expected a non-empty string or a list of them")
    return tuple(items)


def _prompts(value: Any) -> Any:
    """One of OpenAI's four shapes of `prompt`, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _token_ids(value):
            return (tuple(value),)
        if all(isinstance(item, list) and _token_ids(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("expected a string, a list of strings, a list of token ids or a list of lists of token ids")


def _token_ids(value: list) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _lengths(value: Any) -> Any:
    items = (value,) if type(value) is int else value
    if not isinstance(items, list | tuple) or not items or not all(type(i) is int and i > 0 for i in items):
        raise ValueError("expected a number of tokens above 0, or one for each prompt")
    return tuple(items)


def _content(value: Any) -> Any:
    """Text, or text parts joined as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        for part in value:
            if isinstance(part, dict) and part.get("type") not in (None, "text"):
                raise ValueError(f"only text parts are supported, found type '{part['type']}'")
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
    raise ValueError("expected a string or a list of text parts")


def _biases(value: Any) -> Any:
    """Token ids are strings in JSON."""
    if value is None:
        return {}
    if isinstance(value, dict) and all(key.isascii() and key.isdigit() and len(key) < 11 for key in value):
        return {int(key): bias for key, bias in value.items()}
    raise ValueError("expected an object of token ids and biases")


Stop = Annotated[tuple[str, ...], BeforeValidator(_stop), Field(max_length=16)]
Prompts = Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts)]
Lengths = Annotated[tuple[int, ...], BeforeValidator(_lengths)]
Content = Annotated[str, BeforeValidator(_content)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Biases = Annotated[
    dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases), Field(max_length=1024)
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    """`harmless`: documented fields that cannot be honoured, each with the values that need no honouring."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    harmless: ClassVar[dict[str, tuple[Any, ...]]] = {}


class StreamOptions(_Body):
    harmless = {"include_obfuscation": (False,)}
    include_usage: bool | None = None


class SamplingFields(_Body):
    """What completions and chat share. None stands for the default."""

    model: ModelName
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=128)] = None
    seed: Annotated[int | None, Field(ge=-INT64, lt=INT64)] = None
    stop: Stop = ()
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    logit_bias: Biases = {}
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # OpenAI's mark for abuse reports: has no effect on the answer
    # extensions
    top_k: Annotated[int | None, Field(ge=-1)] = None  # 0 and -1: off
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=64)] = None
    ignore_eos: bool | None = None


class CompletionRequest(SamplingFields):
    harmless = {"best_of": (1,), "suffix": ("",)}
    prompt: Prompts
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: bool | None = None
    conditioning_length: Lengths | None = None  # extension: how many first tokens of each prompt condition the vectors


class Message(_Body):
    harmless = {
        "name": ("",),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class ChatRequest(SamplingFields):
    harmless = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),  # there are no tools to call
        "prediction": (),
        "prompt_cache_options": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    # For OpenAI's bookkeeping, not for the answer:
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None


class PromoteRequest(_Body):
    version: Annotated[int, Field(ge=1)]


Model = TypeVar("Model", bound=_Body)


def parse(kind: type[Model], body: bytes) -> Model:
    """The request in `body`. Raises PedroError (400) naming each field at fault, its value and what was expected."""
    from pydantic_core import from_json

    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise PedroError(f"The request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise PedroError("The request body must be a JSON object.", code="invalid_json")
    _drop_harmless(kind, value, "")
    if isinstance(value.get("stream_options"), dict):
        _drop_harmless(StreamOptions, value["stream_options"], "stream_options.")
    if kind is ChatRequest and isinstance(value.get("messages"), list):
        if len(value["messages"]) > MAX_MESSAGES:
            message = f"messages: expected at most {MAX_MESSAGES} items, got {len(value['messages'])}"
            raise PedroError(message, param="messages", code="invalid_value")
        for number, message in enumerate(value["messages"]):
            if isinstance(message, dict):
                _drop_harmless(Message, message, f"messages[{number}].")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _user_error(error) from None


def _drop_harmless(kind: type[_Body], value: dict, prefix: str) -> None:
    for name in kind.harmless.keys() & value.keys():
        given = value.pop(name)
        if given is not None and not any(type(given) is type(ok) and given == ok for ok in kind.harmless[name]):
            field = prefix + name
            raise PedroError(f"{field}: not supported, got {_shown(given)}", param=field, code="unsupported_parameter")


_EXPECTED: dict[str, Callable[[dict], str]] = {
    "missing": lambda ctx: "is required",
    "int_type": lambda ctx: "expected a whole number",
    "float_type": lambda ctx: "expected a number",
    "string_type": lambda ctx: "expected a string",
    "bool_type": lambda ctx: "expected true or false",
    "list_type": lambda ctx: "expected a list",
    "dict_type": lambda ctx: "expected an object",
    "model_type": lambda ctx: "expected an object",
    "literal_error": lambda ctx: f"expected {ctx['expected']}",
    "value_error": lambda ctx: str(ctx["error"]),
    "greater_than_equal": lambda ctx: f"expected >= {ctx['ge']}",
    "greater_than": lambda ctx: f"expected > {ctx['gt']}",
    "less_than_equal": lambda ctx: f"expected <= {ctx['le']}",
    "less_than": lambda ctx: f"expected < {ctx['lt']}",
    "too_long": lambda ctx: f"expected at most {ctx['max_length']} items",
    "too_short": lambda ctx: f"expected at least {ctx['min_length']} items",
}


def _user_error(error: ValidationError) -> PedroError:
    problems = error.errors(include_url=False)
    lines = []
    for problem in problems[:MAX_SHOWN_ERRORS]:
        field = _field(problem["loc"])
        if problem["type"] == "extra_forbidden":
            lines.append(f"Unrecognized request argument supplied: {field}")
        elif problem["type"] == "missing":
            lines.append(f"{field}: is required")
        else:
            describe = _EXPECTED.get(problem["type"])
            expected = describe(problem.get("ctx", {})) if describe else problem["msg"]
            lines.append(f"{field}: {expected}, got {_shown(problem['input'])}")
    if len(problems) > MAX_SHOWN_ERRORS:
        lines.append(f"and {len(problems) - MAX_SHOWN_ERRORS} more")
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
    return PedroError(
        "; ".join(lines),
        param=_field(problems[0]["loc"]),
        code=codes.get(problems[0]["type"], "invalid_value"),
    )


def _field(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "content") is "messages[0].content"."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_VALUE else text[: MAX_SHOWN_VALUE - 3] + "..."
