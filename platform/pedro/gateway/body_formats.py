"""OpenAI's response bodies, as plain dictionaries.

Two formats, `CompletionFormat` and `ChatFormat`, with the same three methods: `chunks` of a stream, one `choice` of a
whole answer, and the envelope around either.
Reference: https://platform.openai.com/docs/api-reference/completions/object and .../chat/streaming
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pedro.gateway.backend import Alternative, Delta, TokenLogprob

IMPOSSIBLE = -9999.0  # stands for minus infinity, which JSON lacks


@dataclass
class Choice:
    """One growing choice. `offset`: characters of the tokens whose logprobs were sent."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    offset: int = 0
    started: bool = False
    queue_s: float | None = None
    embedding: bytes | None = None

    def accept(self, delta: Delta, *, keep: bool) -> None:
        """Adds a delta; `keep` it for a non-streamed answer."""
        assert self.finish_reason is None, f"choice {self.index} continued after its finish_reason"
        self.finish_reason = delta.finish_reason
        self.queue_s = delta.queue_s
        self.embedding = delta.embedding
        self.prompt_tokens = max(self.prompt_tokens, delta.prompt_tokens)
        self.completion_tokens = max(self.completion_tokens, delta.completion_tokens)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if keep:
            self.text.append(delta.text)
            if delta.logprobs is not None:
                self.logprobs = self.logprobs or []
                self.logprobs += delta.logprobs


class BodyFormat(Protocol):
    id: str
    object: str
    chunk_object: str
    model: str
    created: int

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        """The `choices` entries of this delta, one per chunk."""
        ...

    def choice(self, choice: Choice) -> dict[str, Any]: ...


class CompletionFormat:
    object = chunk_object = "text_completion"

    def __init__(self, request_id: str, model: str) -> None:
        self.id, self.model, self.created = request_id, model, int(time.time())

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return []
        logprobs = None
        if delta.logprobs is not None:
            logprobs = completion_logprobs(delta.logprobs, choice.offset)
            choice.offset += sum(len(entry.token) for entry in delta.logprobs)
        return [_completion_choice(choice.index, delta.text, logprobs, delta.finish_reason)]

    def choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = None if choice.logprobs is None else completion_logprobs(choice.logprobs, 0)
        return _completion_choice(choice.index, "".join(choice.text), logprobs, choice.finish_reason)


class ChatFormat:
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, request_id: str, model: str) -> None:
        self.id, self.model, self.created = request_id, model, int(time.time())

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return []
        entries = self.opening(choice)
        if delta.text or delta.logprobs:
            logprobs = None if delta.logprobs is None else chat_logprobs(delta.logprobs)
            entries.append(chat_chunk(choice.index, {"content": delta.text}, logprobs))
        if delta.finish_reason is not None:
            entries.append(chat_chunk(choice.index, {}, None, delta.finish_reason))
        return entries

    def opening(self, choice: Choice) -> list[dict[str, Any]]:
        """The chunk with the role, once for each choice."""
        if choice.started:
            return []
        choice.started = True
        return [chat_chunk(choice.index, {"role": "assistant", "content": "", "refusal": None})]

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": None if choice.logprobs is None else chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }


def envelope(
    body_format: BodyFormat, kind: str, choices: list[dict[str, Any]], fingerprint: str | None
) -> dict[str, Any]:
    return {
        "id": body_format.id,
        "object": kind,
        "created": body_format.created,
        "model": body_format.model,
        "system_fingerprint": fingerprint,
        "choices": choices,
    }


def usage(choices: list[list[Choice]]) -> dict[str, Any]:
    """Token counts of `choices[prompt][choice]`; a prompt counts once, however many choices it has.

    `cached_tokens` are prompt tokens found in the prefix cache.
    """
    prompt_tokens = sum(max(choice.prompt_tokens for choice in of_prompt) for of_prompt in choices)
    cached_tokens = sum(max(choice.cached_tokens for choice in of_prompt) for of_prompt in choices)
    completion_tokens = sum(choice.completion_tokens for of_prompt in choices for choice in of_prompt)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def completion_logprobs(entries: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int) -> dict[str, Any]:
    """The parallel lists of /v1/completions. The chosen token is always among its alternatives."""
    offsets, names, logprobs, top = [], [], [], []
    for entry in entries:
        name, logprob = _token_name(entry), _finite(entry.logprob)
        offsets.append(offset)
        offset += len(entry.token)
        names.append(name)
        logprobs.append(logprob)
        top.append(None if logprob is None else _alternatives(name, logprob, entry.top))
    return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": names, "top_logprobs": top}


def chat_logprobs(entries: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any]:
    content = [
        {**_chat_token(entry), "top_logprobs": [_chat_token(alternative) for alternative in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _alternatives(chosen: str, logprob: float, top: tuple[Alternative, ...]) -> dict[str, float]:
    alternatives = {chosen: logprob}
    for alternative in top:
        alternatives.setdefault(_token_name(alternative), max(alternative.logprob, IMPOSSIBLE))
    return alternatives


def _token_name(token: TokenLogprob | Alternative) -> str:
    """The text, or OpenAI's `bytes:\\x..` for part of a character, so that such parts remain distinct keys."""
    if token.raw is not None:
        try:
            token.raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
    return token.token


def _chat_token(token: TokenLogprob | Alternative) -> dict[str, Any]:
    raw = token.token.encode() if token.raw is None else token.raw
    return {"token": _token_name(token), "logprob": _finite(token.logprob), "bytes": list(raw)}


def _finite(logprob: float | None) -> float | None:
    """A JSON number: tokens that cannot occur get OpenAI's substitute for minus infinity."""
    return None if logprob is None else max(logprob, IMPOSSIBLE)


def _completion_choice(
    index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    """One entry of a chunk's `choices`."""
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
