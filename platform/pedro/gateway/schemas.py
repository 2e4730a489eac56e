"""Request bodies: supported fields, their limits, and fields that are refused.

Every field documented by OpenAI or vLLM's server is recognised. An unsupported one is refused by name unless its value
matches our behaviour anyway; an unknown one is refused, too: no setting is silently ignored. Fields that OpenAI does
not have (`top_k`, `conditioning_length`, ...) are marked as extensions; the `openai` client sends them in `extra_body`.
Beam search and tokenizer requests use the names of vLLM's server. Reference:
https://platform.openai.com/docs/api-reference/completions and .../chat,
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator

from pedro.gateway import vllm_fields

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema

INT32, INT64 = 2**31, 2**63
MAX_STOP_LENGTH = 256  # characters; each is searched for at every token
MAX_BIASES = 300  # as at OpenAI
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
TEXT_PARTS = (None, "text", "input_text", "output_text")


def _stop(value: Any) -> Any:
    """Drop empty texts, which stop nothing."""
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError("expected a string or a list of strings")
    if any(len(item) > MAX_STOP_LENGTH for item in items):
        raise ValueError(f"expected at most {MAX_STOP_LENGTH} characters each")
    return tuple(item for item in items if item)


def _whole(value: Any) -> Any:
    """JSON has one number type: 1.0 is 1."""
    return int(value) if type(value) is float and value.is_integer() else value


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


def _token_ids(value: list[Any]) -> bool:
    return bool(value) and all(type(item) is int and 0 <= item < INT32 for item in value)


def _lengths(value: Any) -> Any:
    items = (value,) if type(value) is int else value
    if not isinstance(items, list | tuple) or not items or not all(type(i) is int and i > 0 for i in items):
        raise ValueError("expected a number of tokens above 0, or one for each prompt")
    return tuple(items)


def _content(value: Any) -> Any:
    """Text, or text parts concatenated."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        for part in value:
            if isinstance(part, dict) and part.get("type") not in TEXT_PARTS:
                raise ValueError(f"only text parts are supported, found type {json.dumps(part['type'])}")
        if all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
    raise ValueError("expected a string or a list of text parts")


def _biases(value: Any) -> Any:
    """Token ids are strings in JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() and len(key) < 11 for key in value):
        raise ValueError("expected an object of token ids and biases")
    if len(value) > MAX_BIASES:
        raise ValueError(f"expected at most {MAX_BIASES} token ids")
    return {int(key): bias for key, bias in value.items()}


def _metadata(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    if len(value) > MAX_METADATA:
        raise ValueError(f"expected at most {MAX_METADATA} pairs")
    for key, text in value.items():
        if not isinstance(text, str) or len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            raise ValueError(f"expected texts of at most {MAX_METADATA_VALUE} characters by keys of at most 64")
        if "\x00" in key + text:
            raise ValueError("expected texts without null characters")
    return value


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text", "input_text", "output_text"] = "text"
    text: str


# What clients may send, for the OpenAPI document; the validators above normalise it.
TokenId = Annotated[int, Field(ge=0, lt=INT32)]
_TokenIds = Annotated[list[TokenId], Field(min_length=1)]
_AnyPrompts = (
    str | Annotated[list[str], Field(min_length=1)] | _TokenIds | Annotated[list[_TokenIds], Field(min_length=1)]
)
_AnyLength = Annotated[int, Field(ge=1)]
_AnyLengths = _AnyLength | Annotated[list[_AnyLength], Field(min_length=1)]
_AnyContent = str | Annotated[list[TextPart], Field(min_length=1)]
_StopText = Annotated[str, Field(max_length=MAX_STOP_LENGTH)]
_AnyStop = _StopText | Annotated[list[_StopText], Field(max_length=16)] | None
_Bias = Annotated[float, Field(ge=-100, le=100)]
_AnyBiases = (
    Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], _Bias], Field(max_length=MAX_BIASES)] | None
)
_Pairs = dict[Annotated[str, Field(max_length=MAX_METADATA_KEY)], Annotated[str, Field(max_length=MAX_METADATA_VALUE)]]
_AnyMetadata = Annotated[_Pairs, Field(max_length=MAX_METADATA)] | None

Whole = BeforeValidator(_whole)
Metadata = Annotated[dict[str, str] | None, BeforeValidator(_metadata, _AnyMetadata)]  # the client's own pairs
Stop = Annotated[tuple[str, ...], Field(max_length=16), BeforeValidator(_stop, _AnyStop)]
Prompts = Annotated[tuple[str | tuple[int, ...], ...], BeforeValidator(_prompts, _AnyPrompts)]
Lengths = Annotated[tuple[int, ...], BeforeValidator(_lengths, _AnyLengths)]
Content = Annotated[str, BeforeValidator(_content, _AnyContent)]
ModelName = Annotated[str, Field(min_length=1, max_length=512)]
Biases = Annotated[dict[int, _Bias], BeforeValidator(_biases, _AnyBiases)]


class Body(BaseModel):
    """`harmless`: documented but unsupported fields, each with the values that have no effect anyway.

    `parts`: fields that contain one such body, or a list of them. `reasons`: why a field is refused.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    harmless: ClassVar[dict[str, tuple[Any, ...]]] = {}
    parts: ClassVar[dict[str, type[Body]]] = {}
    reasons: ClassVar[Mapping[str, str]] = vllm_fields.REASONS

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """JSON Schema of what clients may send, including harmless values of unsupported fields."""
        schema = handler(core)
        told = handler.resolve_ref_schema(schema)
        fields = told.setdefault("properties", {})
        fields |= {name: {"enum": [*values, None]} for name, values in cls.harmless.items()}
        return schema


class StreamOptions(Body):
    include_usage: bool | None = None  # answers that are not streamed always have it
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None  # extension: with include_usage, the usage so far in every chunk


class JsonSchema(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None  # for models that see the schema; no effect
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # answers always conform to the schema


class AnswerFormat(Body):
    harmless = {"structural_tag": ()}
    parts = {"json_schema": JsonSchema}
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """One of these. `json` may be written as text."""

    harmless = {
        "disable_any_whitespace": (False,),
        "disable_additional_properties": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }
    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Annotated[str | None, Field(min_length=1)] = None
    choice: Annotated[list[str] | None, Field(min_length=1)] = None
    grammar: Annotated[str | None, Field(min_length=1)] = None


class SamplingFields(Body):
    """Fields that completions and chat share. None stands for the default.

    With `use_beam_search` the answers are the `n` best of `best_of` beams (default: `n` of `n`), without sampling or
    streaming: `stream`, and a temperature above 0, are refused.
    """

    harmless = vllm_fields.SHARED
    parts = {
        "stream_options": StreamOptions,
        "response_format": AnswerFormat,
        "structured_outputs": StructuredOutputs,
    }
    model: ModelName  # the backbone, tenant.adapter, tenant.adapter@alias or tenant.adapter:version
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None  # 0: greedy; default 1
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None  # 0: only the likeliest token
    n: Annotated[int | None, Field(ge=1, le=128), Whole] = None  # choices per prompt
    seed: Annotated[int | None, Field(ge=-INT64, lt=INT64), Whole] = None  # the same seed gives the same answer
    stop: Stop = ()  # texts that end the answer and are not part of it
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None  # subtracted from generated tokens' logits
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None  # subtracted once per occurrence
    logit_bias: Biases = {}  # by token id
    response_format: AnswerFormat | None = None  # text, json_object, or json_schema with a schema
    stream: bool | None = None  # server-sent events instead of one body
    stream_options: StreamOptions | None = None  # include_usage, continuous_usage_stats
    user: str | None = None  # the client's end user: a canary consistently answers the same users
    cache_salt: Annotated[str | None, Field(max_length=256)] = None  # only prompts with equal salts share a cache
    session_id: str | None = None  # vLLM's: used as `user` if that is missing
    # extensions
    top_k: Annotated[int | None, Field(ge=-1, lt=INT32), Whole] = None  # 0 and -1: off
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None  # minimum share of the likeliest token's probability
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=10)] = None  # divides logits of prompt and answer
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=64)] = None  # tokens that end the answer
    ignore_eos: bool | None = None  # continue to max_tokens
    min_tokens: Annotated[int | None, Field(ge=0, lt=INT32), Whole] = None  # of each answer before it may end
    structured_outputs: StructuredOutputs | None = None  # json, json_object, regex, choice or grammar: one of them
    use_beam_search: bool | None = None  # the n best of best_of beams
    best_of: Annotated[int | None, Field(ge=1, le=128), Whole] = (
        None  # beams kept; without beam search it must equal `n`
    )
    length_penalty: Annotated[float | None, Field(ge=-10, le=10)] = (
        None  # exponent of the length that divides a beam's score
    )
    early_stopping: bool | None = None  # end as soon as `best_of` beams are finished, not only when no other can win


class CompletionRequest(SamplingFields):
    harmless = {**SamplingFields.harmless, **vllm_fields.COMPLETION, "suffix": ("",)}
    prompt: Prompts  # one or several, as text or token ids
    max_tokens: Annotated[int | None, Field(ge=0, lt=INT32), Whole] = None  # of each answer; 0 only with echo
    logprobs: Annotated[int | None, Field(ge=0, le=20), Whole] = None  # alternatives per token
    echo: bool | None = None  # prepend the prompt to the answer
    conditioning_length: Lengths | None = None  # extension: leading tokens of each prompt that condition the vectors


def _role(value: Any) -> Any:
    if value == "function":
        raise ValueError(vllm_fields.REASONS["functions"])
    return value


class Message(Body):
    harmless = {
        "name": ("",),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
        "provider_specific_fields": ({}, {"refusal": None}),  # added to messages by litellm, which sends it back
    }
    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_role)]
    content: Content
    tool_calls: list[dict[str, Any]] | None = None  # of an assistant's turn, which then needs no content
    tool_call_id: str | None = None  # of a turn with the role tool: the call that it answers

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, value: Any) -> Any:
        calls = isinstance(value, dict) and value.get("tool_calls") and value.get("content") is None
        return {**value, "content": ""} if calls else value

    @property
    def uses_tools(self) -> bool:
        """Whether it has more than a role and a text."""
        return bool(self.role == "tool" or self.tool_calls or self.tool_call_id)


def plain_messages(messages: Sequence[Message]) -> tuple[Mapping[str, Any], ...]:
    """The messages for prompt formats; OpenAI's `developer` is the new name of `system`."""
    if any(message.uses_tools for message in messages):
        from pedro.gateway.tool_fields import tool_messages

        return tool_messages(messages)
    return tuple(
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    )


class ChatRequest(SamplingFields):
    parts = {**SamplingFields.parts, "messages": Message}
    harmless = {
        **SamplingFields.harmless,
        **vllm_fields.CHAT,
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "reasoning_effort": ("none",),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: Annotated[list[Message], Field(min_length=1)]  # the conversation so far
    max_tokens: Annotated[int | None, Field(ge=1, lt=INT32), Whole] = None  # of each answer
    max_completion_tokens: Annotated[int | None, Field(ge=1, lt=INT32), Whole] = None  # the same
    tools: list[dict[str, Any]] | None = None  # functions that the model may call
    tool_choice: str | dict[str, Any] | None = None  # none, auto, required, or the function that must be called
    parallel_tool_calls: bool | None = None  # false: one call at most
    logprobs: bool | None = None  # of the chosen tokens
    top_logprobs: Annotated[int | None, Field(ge=0, le=20), Whole] = None  # alternatives per token
    conditioning: Literal["prompt", "system"] | None = (
        None  # extension: what conditions the vectors, the whole prompt or the system turn
    )
    metadata: dict[str, str] | None = None  # this and the next fields are OpenAI's bookkeeping: no effect on the answer
    prompt_cache_key: str | None = None  # no effect
    prompt_cache_retention: str | None = None  # no effect
    safety_identifier: str | None = None  # no effect
    service_tier: Literal["auto", "default"] | None = None  # no effect


class TokenizeRequest(Body):
    """A text, or messages as chat would render them: exactly one of the two."""

    parts = {"messages": Message}
    harmless = {
        **{name: ok for name, ok in vllm_fields.CHAT_PROMPT.items() if name != "add_special_tokens"},
        "tools": ([],),
    }
    model: ModelName | None = None  # the backbone's tokenizer if not given
    prompt: str | None = None  # a text
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None  # as chat takes them
    add_special_tokens: bool | None = None  # of a text, default true; the format of messages determines theirs
    return_token_strs: bool | None = None  # also return the vocabulary's pieces


class DetokenizeRequest(Body):
    model: ModelName | None = None  # the backbone if not given
    tokens: Annotated[list[TokenId], FailFast()]  # their ids


class PromoteRequest(Body):
    version: Annotated[int, Field(ge=1, lt=INT32)]  # the version to make champion
    expected: Annotated[int, Field(ge=1, lt=INT32)] | None = None  # refuse (409) if the champion is a different version


class FeedbackRequest(Body):
    """One of `version` and `system_fingerprint`, one of `score` and `thumb`."""

    version: Annotated[int, Field(ge=1, lt=INT32)] | None = None  # the version that answered
    system_fingerprint: Annotated[str, Field(max_length=400)] | None = None  # or the answer's system_fingerprint
    score: Annotated[float, Field(ge=0, le=1)] | None = None  # of the answer: 1 is best
    thumb: Literal["up", "down"] | None = None  # instead of score 1 or 0


class ShadowRequest(Body):
    version: Annotated[int, Field(ge=1, lt=INT32)]  # the version that gets copies
    weight: Annotated[float, Field(ge=0, le=1)]  # share of the champion's requests that are copied; 0 ends it


class CanaryRequest(Body):
    version: Annotated[int, Field(ge=1, lt=INT32)]  # the version that answers a share
    weight: Annotated[float, Field(ge=0, lt=1)]  # its share of the champion's requests; 0 ends it
