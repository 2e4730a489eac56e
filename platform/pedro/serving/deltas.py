"""Turns an engine's outputs into the gateway's deltas. Knows nothing of streams, slices or replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pedro.engine.sequence import Output, Request
from pedro.engine.sequence import TokenLogprob as EngineLogprob
from pedro.gateway.backend import Alternative, Delta, GenerateCall, TokenLogprob
from pedro.serving.tokens import TokenTexts


class Deltas:
    """The deltas of one call. With echo, the prompt stands in front of each choice's first."""

    def __init__(
        self, tokenizer: Any, texts: TokenTexts, request: Request, call: GenerateCall, fingerprint: str
    ) -> None:
        self._texts = texts
        self._request = request
        self._fingerprint = fingerprint
        self._logprobs = call.params.get("logprobs") is not None
        self._unopened = set(range(request.n)) if call.echo else set()
        self._text = call.prompt if isinstance(call.prompt, str) else None
        if call.echo and self._text is None:
            self._text = tokenizer.decode(request.prompt_ids, skip_special_tokens=True)

    def __call__(self, outputs: Iterable[Output]) -> list[Delta]:
        """One delta a choice for all its outputs, in the order of their first ones."""
        choices: dict[int, list[Output]] = {}
        for output in outputs:
            choices.setdefault(output.index, []).append(output)
        return [self._merge(index, of_choice) for index, of_choice in choices.items()]

    def _merge(self, index: int, outputs: list[Output]) -> Delta:
        last = outputs[-1]
        logprobs = None
        if outputs[0].logprobs is not None:
            logprobs = tuple(self._logprob(entry) for output in outputs for entry in output.logprobs or ())
        delta = Delta(
            index=index,
            text="".join([output.text for output in outputs]),
            token_ids=tuple([token for output in outputs for token in output.token_ids]),
            finish_reason=last.finish_reason,
            logprobs=logprobs,
            prompt_tokens=last.prompt_tokens,
            completion_tokens=last.completion_tokens,
            fingerprint=self._fingerprint,
            queue_s=last.timing.queue_s if last.timing else None,
        )
        if index in self._unopened:
            self._unopened.discard(index)
            return self._echoed(delta, outputs[0])
        return delta

    def _echoed(self, delta: Delta, first: Output) -> Delta:
        """The delta with the prompt's text, ids and logprobs before it."""
        ids = self._request.prompt_ids
        logprobs = delta.logprobs
        if self._logprobs and first.prompt_logprobs is not None:
            pairs = zip(ids, first.prompt_logprobs, strict=True)
            scored = [self._logprob(entry or EngineLogprob(token, math.nan)) for token, entry in pairs]
            logprobs = (*scored, *(logprobs or ()))
        return replace(
            delta, text=(self._text or "") + delta.text, token_ids=(*ids, *delta.token_ids), logprobs=logprobs
        )

    def _logprob(self, entry: EngineLogprob) -> TokenLogprob:
        text, raw = self._texts(entry.token_id)
        top = []
        for token_id, logprob in entry.top:
            other, other_raw = self._texts(token_id)
            top.append(Alternative(other, logprob, other_raw))
        return TokenLogprob(text, None if math.isnan(entry.logprob) else entry.logprob, tuple(top), raw)
