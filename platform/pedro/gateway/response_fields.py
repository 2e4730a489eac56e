"""The body of /v1/responses, as far as it can be supported without storing responses.

Fields that need stored responses, or tools run by OpenAI, are refused by name with an alternative. The items of `input`
are parsed by `response_input.py`.
Reference: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from pedro.gateway.schemas import INT32, INT64, Biases, Body, Metadata, ModelName, Stop, Whole
from pedro.gateway.vllm_fields import REASONS, SHARED, Harmless

_STATELESS = "responses are not stored here; send the turns so far in input"
_HERE = "responses are answered within their request"
_CACHE = "the server manages its prefix cache"


def _input(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        return value
    raise ValueError("expected a string or a list of items")


def _tool_choice(value: Any) -> Any:
    if value is None or isinstance(value, str | dict):
        return value
    raise ValueError('expected none, auto, required or {"type": "function", "name": …}')


Input = Annotated[str | list[dict[str, Any]], BeforeValidator(_input)]
ToolChoice = Annotated[str | dict[str, Any] | None, BeforeValidator(_tool_choice)]


class ResponseFormat(Body):
    """What `text.format` may be: `name` and `schema` belong to json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str | None, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = None
    description: str | None = None  # for models that see the schema; no effect
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None  # answers always conform to the schema


class ResponseText(Body):
    harmless: ClassVar[Harmless] = {"verbosity": ("medium",)}
    parts: ClassVar[dict[str, type[Body]]] = {"format": ResponseFormat}
    format: ResponseFormat | None = None


class ResponseStreamOptions(Body):
    harmless: ClassVar[Harmless] = {"prewarm": (False,)}
    include_obfuscation: bool | None = None


class ResponsesRequest(Body):
    harmless: ClassVar[Harmless] = {
        **{name: ok for name, ok in SHARED.items() if name != "prompt_logprobs"},
        "access_programs": (),
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "include": ([],),
        "moderation": (),
        "n": (1,),
        "previous_response_id": ("",),
        "prompt": (),
        "prompt_cache_options": (),
        "reasoning": ({}, {"effort": None}, {"effort": "none"}, {"effort": None, "summary": None}),
        "store": (False,),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
        "use_beam_search": (False,),
    }
    reasons: ClassVar[dict[str, str]] = {
        **REASONS,
        "previous_response_id": _STATELESS,
        "conversation": _STATELESS,
        "context_management": _STATELESS,
        "store": "responses are not stored here; send store=false or leave it out, and the turns so far in input",
        "background": f"{_HERE}; for answers later send a batch of the endpoint /v1/responses",
        "prompt": "prompt templates are not stored here; send instructions and input",
        "include": "nothing more can be included; /v1/chat/completions returns logprobs",
        "top_logprobs": "/v1/chat/completions returns logprobs",
        "truncation": "an input that is too long is refused, not cut; send the turns that fit",
        "reasoning": "the models here do not reason; leave it out",
        "n": "a response has one answer; repeat the request, or send n to /v1/chat/completions",
        "use_beam_search": "send it to /v1/chat/completions",
        "image": "prompts are text",
        "prompt_cache_options": _CACHE,
    }
    parts: ClassVar[dict[str, type[Body]]] = {"text": ResponseText, "stream_options": ResponseStreamOptions}
    model: ModelName  # the backbone, tenant.adapter, tenant.adapter@alias or tenant.adapter:version
    input: Input  # a text, or the turns so far: messages, calls of tools and their results
    instructions: str | None = None  # a system message in front of the input
    max_output_tokens: Annotated[int | None, Field(ge=1, lt=INT32), Whole] = None  # of the answer
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None  # 0: greedy; default 1
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None  # 0: only the likeliest token
    text: ResponseText | None = None  # format: text, json_object, or json_schema with name and schema
    tools: list[dict[str, Any]] | None = None  # functions that the model may call
    tool_choice: ToolChoice = None  # none, auto, required, or the function that must be called
    parallel_tool_calls: bool | None = None  # false: one call at most
    stream: bool | None = None  # typed events instead of one body
    stream_options: ResponseStreamOptions | None = None  # include_obfuscation
    metadata: Metadata = None  # the client's own; returned with the response
    user: str | None = None  # the client's end user: a canary consistently answers the same users
    safety_identifier: str | None = None  # this and the next fields are OpenAI's bookkeeping: no effect on the answer
    prompt_cache_key: str | None = None  # no effect
    prompt_cache_retention: str | None = None  # no effect
    service_tier: Literal["auto", "default"] | None = None  # no effect
    max_tool_calls: Annotated[int | None, Field(ge=1, lt=INT32), Whole] = None  # of tools that OpenAI runs: no effect
    # extensions
    seed: Annotated[int | None, Field(ge=-INT64, lt=INT64), Whole] = None  # the same seed gives the same answer
    stop: Stop = ()  # texts that end the answer and are not part of it
    logit_bias: Annotated[Biases, Field(default_factory=dict)]  # by token id
    top_k: Annotated[int | None, Field(ge=-1, lt=INT32), Whole] = None  # 0 and -1: off
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None  # minimum share of the likeliest token's probability
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None  # subtracted from generated tokens' logits
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None  # subtracted once per occurrence
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=10)] = None  # divides logits of prompt and answer
    ignore_eos: bool | None = None  # continue to max_output_tokens
    cache_salt: Annotated[str | None, Field(max_length=256)] = None  # only prompts with equal salts share a cache


EXTENSIONS = (
    "seed",
    "stop",
    "logit_bias",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "cache_salt",
)
SAME = ("model", "temperature", "top_p", "stream", "user", "parallel_tool_calls", *EXTENSIONS)
"""The fields with the same meaning in /v1/chat/completions."""
