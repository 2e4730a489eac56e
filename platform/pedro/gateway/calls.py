"""Turns a checked request into calls for the backend. Knows nothing of HTTP or of what the answers look like."""

from __future__ import annotations

import uuid
from typing import Any

from pedro.errors import PedroError
from pedro.gateway.backend import GenerateCall
from pedro.gateway.schemas import ChatRequest, CompletionRequest, SamplingFields

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; chat goes on to the end of the context
_SHARED = ("seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty", "ignore_eos")


def completion_calls(
    request: CompletionRequest, *, tenant: str, trace_id: str, max_choices: int
) -> tuple[GenerateCall, ...]:
    """One call a prompt, in the order of the prompts. Raises PedroError for fields that contradict each other."""
    _check_shared(request)
    n, prompts = request.n or 1, request.prompt
    if n * len(prompts) > max_choices:
        raise PedroError(f"n: {len(prompts)} prompts × {n} exceed {max_choices} choices a request", param="n")
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and not request.echo:
        raise PedroError("max_tokens: expected >= 1 unless echo is true, got 0", param="max_tokens")
    params = _params(request) | {"max_tokens": max_tokens}
    if request.logprobs is not None:
        params["logprobs"] = request.logprobs
    stem = uuid.uuid4().hex
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
            trace_id=trace_id,
        )
        for number, (prompt, length) in enumerate(zip(prompts, _conditioning(request), strict=True))
    )


def chat_call(request: ChatRequest, *, tenant: str, trace_id: str, max_choices: int) -> GenerateCall:
    """Raises PedroError for fields that contradict each other."""
    _check_shared(request)
    n = request.n or 1
    if n > max_choices:
        raise PedroError(f"n: {n} exceeds {max_choices} choices a request", param="n")
    if request.top_logprobs is not None and not request.logprobs:
        raise PedroError("top_logprobs: needs logprobs to be true", param="top_logprobs")
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise PedroError("max_tokens: differs from max_completion_tokens; send one of them", param="max_tokens")
    params = _params(request)
    if limits:
        params["max_tokens"] = limits.pop()
    if request.logprobs:
        params["logprobs"] = request.top_logprobs or 0
    messages = tuple(
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in request.messages
    )
    return GenerateCall(
        request_id=f"chatcmpl-{uuid.uuid4().hex}-0",
        tenant=tenant,
        model=request.model,
        messages=messages,
        params=params,
        n=n,
        trace_id=trace_id,
    )


def _check_shared(request: SamplingFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise PedroError("stream_options: needs stream to be true", param="stream_options")


def _params(request: SamplingFields) -> dict[str, Any]:
    """OpenAI's defaults where it has them, and only what was set otherwise."""
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
