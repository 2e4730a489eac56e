"""/v1/completions and /v1/chat/completions: turns validated bodies into backend calls and admits them."""

from __future__ import annotations

import math
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from pedro.errors import PedroError
from pedro.gateway.answer import ChoicesAnswer
from pedro.gateway.answer_shapes import answer_shape
from pedro.gateway.auth import Principal, backend_for, require
from pedro.gateway.backend import AnswerShape, GenerateCall
from pedro.gateway.body_formats import ChatFormat, CompletionFormat
from pedro.gateway.edge import request_id_of
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.quotas import admit, reservation
from pedro.gateway.schemas import ChatRequest, CompletionRequest, SamplingFields, StreamOptions, plain_messages
from pedro.store import INFER

TIMEOUT = "x-request-timeout"
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chats are only limited by the context
_BEAMS = ("length_penalty", "early_stopping")
_SHARED = ("seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty", "ignore_eos", "min_tokens")
router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, caller: Annotated[Principal, Depends(require(INFER))]) -> Response:
    wanted = parse(CompletionRequest, await read_body(request))
    calls = completion_calls(wanted, **call_context(request, caller))
    body_format = CompletionFormat(calls[0].request_id.rpartition("-")[0], wanted.model)
    backend = backend_for(request, caller)
    ticket = await admit(request, caller, reservation(calls))
    return ChoicesAnswer(backend, calls, body_format, ticket, **_delivery(request, caller, wanted))


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, caller: Annotated[Principal, Depends(require(INFER))]) -> Response:
    wanted = parse(ChatRequest, await read_body(request))
    call = chat_call(wanted, **call_context(request, caller))
    body_format = _chat_format(call)
    backend = backend_for(request, caller)
    ticket = await admit(request, caller, reservation([call]))
    return ChoicesAnswer(backend, [call], body_format, ticket, **_delivery(request, caller, wanted))


def _chat_format(call: GenerateCall) -> ChatFormat:
    request_id = call.request_id.rpartition("-")[0]
    if call.tools is None or not call.tools.may_call:
        return ChatFormat(request_id, call.model)
    from pedro.gateway.tool_answers import ToolChatFormat

    names = [tool["function"]["name"] for tool in call.tools.tools]
    return ToolChatFormat(request_id, call.model, names, call.tools.parallel)


def call_context(request: Request, caller: Principal) -> dict[str, Any]:
    """The fields that all calls of a request share."""
    return {
        "tenant": caller.view,
        "trace_id": request_id_of(request.scope),
        "max_choices": request.app.state.settings.max_choices,
        "timeout_s": _timeout_s(request),
    }


def _timeout_s(request: Request) -> float | None:
    """The header `x-request-timeout`, in seconds: how long the answer may take, up to the server's limit."""
    given = request.headers.get(TIMEOUT)
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise PedroError(f"{TIMEOUT}: expected seconds above 0, got {given[:40]!r}", param=TIMEOUT)
    return timeout_s


def _delivery(request: Request, caller: Principal, wanted: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """The answer's format, and its entry in the usage ledger."""
    entry = request.app.state.usage.entry(caller.tenant, caller.key_id, wanted.model)
    return {"entry": entry, "stream": bool(wanted.stream), "options": wanted.stream_options or StreamOptions()}


def completion_calls(
    request: CompletionRequest, *, tenant: str, trace_id: str, max_choices: int, timeout_s: float | None = None
) -> tuple[GenerateCall, ...]:
    """One call per prompt, in order. Raises PedroError for contradictory fields."""
    _check_shared(request)
    n, prompts, wide = request.n or 1, request.prompt, _width(request)
    if wide * len(prompts) > max_choices:
        field = "n" if wide == n else "best_of"
        raise PedroError(
            f"{field}: {len(prompts)} prompts × {wide} exceed {max_choices} choices per request", param=field
        )
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and (request.use_beam_search or not request.echo):
        raise PedroError("max_tokens: expected >= 1 unless echo is true without beam search, got 0", param="max_tokens")
    params = _params(request) | {"max_tokens": max_tokens}
    if request.logprobs is not None:
        params["logprobs"] = request.logprobs
    stem, shape = uuid.uuid4().hex, _shape(request)
    return tuple(
        GenerateCall(
            request_id=f"cmpl-{stem}-{number}",
            tenant=tenant,
            model=request.model,
            prompt=prompt,
            params=params,
            n=n,
            conditioning_length=length,
            echo=bool(request.echo),
            timeout_s=timeout_s,
            trace_id=trace_id,
            user=request.user or request.session_id,
            cache_salt=request.cache_salt or "",
            shape=shape,
        )
        for number, (prompt, length) in enumerate(zip(prompts, _conditioning(request), strict=True))
    )


def chat_call(
    request: ChatRequest, *, tenant: str, trace_id: str, max_choices: int, timeout_s: float | None = None
) -> GenerateCall:
    """Raises PedroError for contradictory fields."""
    _check_shared(request)
    n, wide = request.n or 1, _width(request)
    if wide > max_choices:
        field = "n" if wide == n else "best_of"
        raise PedroError(f"{field}: {wide} exceeds {max_choices} choices per request", param=field)
    if request.top_logprobs and not request.logprobs:
        raise PedroError("top_logprobs: needs logprobs to be true", param="top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise PedroError("max_tokens: differs from max_completion_tokens; send one of them", param="max_tokens")
    tools = None
    if request.tools or request.tool_choice is not None:
        from pedro.gateway.tool_fields import tool_use

        tools = tool_use(request)
    params = _params(request)
    if limits:
        params["max_tokens"] = limits.pop()
    if request.logprobs:
        params["logprobs"] = request.top_logprobs or 0
    return GenerateCall(
        request_id=f"chatcmpl-{uuid.uuid4().hex}-0",
        tenant=tenant,
        model=request.model,
        messages=plain_messages(request.messages),
        params=params,
        n=n,
        conditioning=request.conditioning,
        timeout_s=timeout_s,
        trace_id=trace_id,
        user=request.user or request.session_id,
        cache_salt=request.cache_salt or "",
        shape=_shape(request),
        tools=tools,
    )


def _check_shared(request: SamplingFields) -> None:
    n, width = request.n or 1, request.best_of
    if request.use_beam_search:
        if request.stream:
            raise PedroError(
                "stream: beam search cannot be streamed, since beams change until they finish; send stream=false",
                param="stream",
            )
        if request.temperature:
            raise PedroError(
                f"temperature: expected 0 with use_beam_search, got {request.temperature:g}", param="temperature"
            )
        if width is not None and width < n:
            raise PedroError(f"best_of: expected >= n, which is {n}, got {width}", param="best_of")
        return
    if width not in (None, n):
        raise PedroError(
            f"best_of: expected n, which is {n}, unless use_beam_search is true, got {width}", param="best_of"
        )
    for name, value, default in (
        ("length_penalty", request.length_penalty, 1.0),
        ("early_stopping", request.early_stopping, False),
    ):
        if value not in (None, default):
            raise PedroError(f"{name}: needs use_beam_search to be true", param=name)


def _shape(request: SamplingFields) -> AnswerShape | None:
    """The shape of the answers."""
    plain = request.response_format is None and request.structured_outputs is None
    return None if plain else answer_shape(request)


def _width(request: SamplingFields) -> int:
    """Sequences that one prompt occupies."""
    return max(request.n or 1, request.best_of or 1)


def _params(request: SamplingFields) -> dict[str, Any]:
    """OpenAI's defaults where it has them; otherwise only fields that were set."""
    params: dict[str, Any] = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
    }
    params |= {name: getattr(request, name) for name in _SHARED if getattr(request, name) is not None}
    if request.stop:
        params["stop"] = request.stop
    if request.logit_bias:
        params["logit_bias"] = request.logit_bias
    if request.stop_token_ids:
        params["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.top_k is not None and request.top_k > 0:
        params["top_k"] = request.top_k
    if params["top_p"] == 0:  # the smallest possible set: the likeliest token
        params |= {"top_p": 1.0, "top_k": 1}
    if request.use_beam_search:
        params |= {"temperature": 0.0, "num_beams": _width(request)}
        params |= {name: getattr(request, name) for name in _BEAMS if getattr(request, name) is not None}
    return params


def _conditioning(request: CompletionRequest) -> tuple[int | None, ...]:
    prompts, lengths = request.prompt, request.conditioning_length
    if lengths is None:
        return (None,) * len(prompts)
    if len(lengths) == 1:
        lengths = lengths * len(prompts)
    if len(lengths) != len(prompts):
        raise PedroError(
            f"conditioning_length: expected one number, or one for each of {len(prompts)} prompts, got {len(lengths)}",
            param="conditioning_length",
        )
    for prompt, length in zip(prompts, lengths, strict=True):
        if not isinstance(prompt, str) and length > len(prompt):
            raise PedroError(
                f"conditioning_length: expected <= {len(prompt)}, the tokens of the prompt, got {length}",
                param="conditioning_length",
            )
    return lengths
