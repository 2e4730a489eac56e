"""One engine behind an async face: text in, slices of text out. Knows nothing of Ray or HTTP.

Tokens leave in slices of time rather than one by one, since each hop between processes costs about 2 ms; the first
one leaves at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pedro.backbone import context_length, load_model, load_tokenizer, resolve_backbone
from pedro.config import Settings
from pedro.data.formats import PromptFormat, encode_prompt, format_for_shape
from pedro.data.shapes import Shape
from pedro.engine.engine import Engine, EngineConfig
from pedro.engine.sequence import Output, Request, SamplingParams
from pedro.engine.sequence import TokenLogprob as EngineLogprob
from pedro.engine.thread import EngineThread
from pedro.errors import AdapterError, NotFoundError, PedroError, UnavailableError
from pedro.gateway.backend import Alternative, Delta, GenerateCall, TokenLogprob
from pedro.methods.adapter_files import read_manifest
from pedro.registry import Registry
from pedro.serving.config import ServeConfig
from pedro.serving.tokens import TokenTexts

SLICE_S = 0.03
CACHED_FORMATS = 4096
LONG_TEXT = 8192  # characters; tokenising more takes long enough to hold up the streams of others
SHRINKAGE = 4  # how much shorter a tokenizer's normalisation could make a text
log = logging.getLogger("pedro.serving")


class Replica:
    """Loads the backbone once and serves it with every adapter of the registry."""

    def __init__(self, config: ServeConfig, settings: Settings) -> None:
        torch.set_num_threads(config.threads)
        backbone = resolve_backbone(config.backbone)
        self._registry = Registry.open(settings)
        self._registry.catalog()  # connect now rather than under the first request
        self._bare = f"{config.model_name}#{backbone.digest}"
        self._tokenizer = load_tokenizer(backbone)
        self._texts = TokenTexts(self._tokenizer)
        self._longest_piece = max(map(len, self._tokenizer.get_vocab()))
        self._encoding = asyncio.Semaphore(2)
        self._plain_format = format_for_shape(Shape.MESSAGES, self._tokenizer)
        self._formats: OrderedDict[str, PromptFormat] = OrderedDict()
        longest = context_length(backbone)
        engine = Engine(
            load_model(backbone, config.dtype, config.device),
            self._tokenizer,
            EngineConfig(
                max_batch=config.max_batch,
                max_length=min(config.max_length or longest, longest),
                adapter_bytes=int(config.adapter_budget_mb * 2**20),
                max_waiting=config.max_waiting,
            ),
            self._fetch,
            backbone.digest,
        )
        self._thread = EngineThread(engine)
        self._thread.start()

    async def generate(
        self, call: GenerateCall, ref: str | None, resumed: tuple[int, ...] = ()
    ) -> AsyncGenerator[list[Delta] | PedroError, None]:
        """Slices of deltas for `call`, answered by the adapter version `ref` (None: the bare backbone).

        `resumed` are tokens of the answer that another replica sent before it was lost; they are not sent again.
        An error ends the stream as its last item; one that comes first means that the call was not admitted.
        """
        arrived: list[Output] = []
        any_arrived, any_ended = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def take(output: Output) -> None:
            arrived.append(output)
            any_arrived.set()
            if output.finish_reason is not None:
                any_ended.set()

        def hand_over(output: Output) -> None:
            loop.call_soon_threadsafe(take, output)

        try:
            request = await self._request(call, ref, resumed)
            self._thread.submit(request, hand_over)
        except PedroError as error:
            yield error
            return
        unfinished, opened = request.n, False
        echo = _Echo(self._tokenizer, self._texts, request, call)
        try:
            while unfinished:
                await any_arrived.wait()
                if opened:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(SLICE_S):
                            await any_ended.wait()
                batch, arrived[:] = arrived[:], []
                any_arrived.clear()
                any_ended.clear()
                failed = next((output.error for output in batch if output.error), None)
                if failed is not None:
                    yield failed
                    return
                unfinished -= sum(output.finish_reason is not None for output in batch)
                opened = True
                yield self._deltas(batch, echo, ref or self._bare)
        finally:
            if unfinished:
                self._thread.cancel(request.id)

    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self._thread.alive

    def check_health(self) -> None:
        """Raises where only a new process helps."""
        if not self._thread.alive:
            raise UnavailableError("the engine thread has ended")

    def stats(self) -> dict[str, Any]:
        """The engine's figures."""
        return self._thread.engine.stats()

    def close(self) -> None:
        """End the engine; unfinished requests are told."""
        self._thread.stop()

    def _fetch(self, ref: str) -> Path:
        """The directory of the version and digest that `ref` names. Runs on a loader thread."""
        named, _, digest = ref.partition("#")
        name, _, number = named.rpartition(":")
        try:
            version = self._registry.get(name, int(number))
        except NotFoundError as error:
            raise _gone(named) from error
        if version.digest != digest:
            raise _gone(named)
        try:
            return self._registry.download(version)
        except AdapterError as error:  # the store's fault, not the caller's
            raise UnavailableError(error.message, param="model", code="adapter_unavailable") from error

    async def _request(self, call: GenerateCall, ref: str | None, resumed: tuple[int, ...] = ()) -> Request:
        """The engine's request: the prompt rendered as the adapter was trained, the sampling checked."""
        if call.messages is not None:
            form = self._plain_format if ref is None else await self._format_of(ref)
            ids = await self._encode(form.render(call.messages), "messages")
        elif isinstance(call.prompt, str):
            ids = await self._encode(call.prompt, "prompt")
        else:
            ids = list(call.prompt or ())
        prompt_logprobs = (call.params.get("logprobs") or 0) if call.echo else None
        params = SamplingParams(**call.params, prompt_logprobs=prompt_logprobs)
        return Request(
            id=call.request_id,
            tenant=call.tenant,
            prompt_ids=ids,
            adapter=ref,
            params=params,
            conditioning_length=call.conditioning_length,
            n=call.n,
            resumed_ids=resumed,
        )

    async def _encode(self, text: str, param: str) -> list[int]:
        """The prompt's ids. A long text is tokenised on a thread, one that cannot fit is refused without being."""
        longest = self._thread.engine.max_length
        least = len(text) // (self._longest_piece * SHRINKAGE)
        if least > longest:
            raise PedroError(
                f"{param}: a prompt of {len(text):,} characters has more than {least:,} tokens, and the context is "
                f"{longest:,} tokens; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if len(text) <= LONG_TEXT:
            return encode_prompt(self._tokenizer, text)
        async with self._encoding:
            return await asyncio.to_thread(encode_prompt, self._tokenizer, text)

    async def _format_of(self, ref: str) -> PromptFormat:
        form = self._formats.get(ref)
        if form is None:
            directory = await asyncio.to_thread(self._fetch, ref)
            form = PromptFormat.from_dict(read_manifest(directory).get("prompt_format") or {})
            self._formats[ref] = form
            if len(self._formats) > CACHED_FORMATS:
                self._formats.popitem(last=False)
        return form

    def _deltas(self, batch: list[Output], echo: _Echo, fingerprint: str) -> list[Delta]:
        """One delta a choice for all its outputs of this slice."""
        merged: dict[int, Delta] = {}
        for output in batch:
            before = merged.get(output.index) or echo.opening(output, fingerprint)
            logprobs = before.logprobs
            if output.logprobs is not None:
                logprobs = (*(logprobs or ()), *(_logprob(self._texts, entry) for entry in output.logprobs))
            merged[output.index] = replace(
                before,
                text=before.text + output.text,
                token_ids=(*before.token_ids, *output.token_ids),
                finish_reason=output.finish_reason,
                logprobs=logprobs,
                prompt_tokens=output.prompt_tokens,
                completion_tokens=output.completion_tokens,
            )
        return list(merged.values())


class _Echo:
    """Puts the prompt in front of each choice where the call asked for it."""

    def __init__(self, tokenizer: Any, texts: TokenTexts, request: Request, call: GenerateCall) -> None:
        self._texts = texts
        self._request = request
        self._logprobs = call.params.get("logprobs") is not None
        self._unopened = set(range(request.n)) if call.echo else set()
        self._text = call.prompt if isinstance(call.prompt, str) else None
        if call.echo and self._text is None:
            self._text = tokenizer.decode(request.prompt_ids, skip_special_tokens=True)

    def opening(self, output: Output, fingerprint: str) -> Delta:
        """An empty delta of the choice or, the first time with echo, the prompt's text, ids and logprobs."""
        delta = Delta(index=output.index, fingerprint=fingerprint)
        if output.index not in self._unopened:
            return delta
        self._unopened.discard(output.index)
        ids = self._request.prompt_ids
        logprobs = None
        if self._logprobs and output.prompt_logprobs is not None:
            pairs = zip(ids, output.prompt_logprobs, strict=True)
            logprobs = tuple(_logprob(self._texts, entry or EngineLogprob(token, math.nan)) for token, entry in pairs)
        return replace(delta, text=self._text or "", token_ids=tuple(ids), logprobs=logprobs)


def _logprob(texts: TokenTexts, entry: EngineLogprob) -> TokenLogprob:
    text, raw = texts(entry.token_id)
    top = []
    for token_id, logprob in entry.top:
        other, other_raw = texts(token_id)
        top.append(Alternative(other, logprob, other_raw))
    return TokenLogprob(text, None if math.isnan(entry.logprob) else entry.logprob, tuple(top), raw)


def _gone(named: str) -> UnavailableError:
    return UnavailableError(f"model: the version {named} that this request was admitted with is gone; ask again")
