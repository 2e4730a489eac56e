"""One engine behind an async face: calls in, slices of deltas out. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from pedro.backbone import context_length, load_model, load_tokenizer, resolve_backbone
from pedro.config import Settings
from pedro.data.prompt_format import PromptFormat, encode_prompt, encode_text, format_for_shape
from pedro.data.row_shapes import RowShape
from pedro.data.special_tokens import special_tokens
from pedro.engine.adapter_pool import unusable
from pedro.engine.adapter_state import ResidentAdapter
from pedro.engine.engine import Engine, EngineConfig
from pedro.engine.engine_thread import EngineThread
from pedro.engine.kernel_threads import granted_cores
from pedro.engine.sequence import Output, Request, SamplingParams
from pedro.errors import AdapterError, DataError, NotFoundError, PedroError, UnavailableError
from pedro.gateway.backend import AdapterResidence, GenerateCall, TokenizeResult
from pedro.methods.adapter_files import check_tokenizer, read_manifest
from pedro.refs import ModelRef
from pedro.registry import DAMAGED, Registry
from pedro.serving.config import ServeConfig
from pedro.serving.deltas import Deltas
from pedro.serving.metrics import ReplicaMetrics
from pedro.serving.outlet import Outlet
from pedro.serving.rendering import Rendering, to_its_end
from pedro.serving.tokens import TokenTexts, tokenizer_info
from pedro.serving.wire import Posted, ReplicaLost, Slice

CACHED_FORMATS = 4096
LONG_TEXT = 8192  # characters; tokenising more takes long enough to hold up the streams of others
SHRINKAGE = 4  # how much shorter a tokenizer's normalisation could make a text
LOAD_TIMEOUT_S = 60.0
SWITCH_S = 0.0005  # how long the event loop may keep the interpreter from the engine's thread
log = logging.getLogger("pedro.serving")


class Replica:
    """Loads the backbone once and serves it with every adapter of the registry. `name` tells it from other replicas."""

    def __init__(self, config: ServeConfig, settings: Settings, name: str = "local") -> None:
        threads = config.threads or granted_cores()
        torch.set_num_threads(threads)
        sys.setswitchinterval(SWITCH_S)
        backbone = resolve_backbone(config.backbone)
        self.name = name
        self._tokenizer_digests = backbone.tokenizer_digests
        self._registry = Registry.open(settings)
        self._registry.catalog()  # connect now rather than under the first request
        self._backbone_digest = backbone.digest
        self._bare = f"{config.model_name}#{backbone.digest}"
        self._tokenizer = load_tokenizer(backbone)
        self._texts = TokenTexts(self._tokenizer)
        self._longest_piece = max(map(len, self._tokenizer.get_vocab()))
        self._encoding = asyncio.Semaphore(2)
        self._plain_format = format_for_shape(RowShape.MESSAGES, self._tokenizer)
        self._rendering = Rendering(self._tokenizer, [self._plain_format.template])
        self._formats: OrderedDict[ModelRef, PromptFormat] = OrderedDict()
        self._outlets: dict[str, Outlet] = {}
        self._refs: dict[str, tuple[ModelRef | None, int]] = {}  # of unfinished requests: adapter, choices to finish
        longest = context_length(backbone)
        self._engine = Engine(
            load_model(backbone, config.dtype, config.device),
            self._tokenizer,
            EngineConfig(
                max_batch=config.max_batch,
                max_length=min(config.max_length or longest, longest),
                adapter_bytes=int(config.adapter_budget_mb * 2**20),
                max_waiting=config.max_waiting,
                tenant_weights=config.tenant_weights,
                threads=threads,
            ),
            self._fetch,
            backbone.digest,
        )
        if self._engine.stats()["kernel"] == "native":
            torch.set_num_threads(1)  # what is left to PyTorch is small, and its threads wait for those put aside
        self._metrics = ReplicaMetrics(name, config.model_name, self._engine.stats)
        self._thread = EngineThread(self._engine, on_outputs=self._hand_out)
        self._thread.start()

    # calls

    async def stream(self, link: str) -> AsyncGenerator[Slice, None]:
        """The outputs of all calls posted under `link`; whoever stops reading ends them."""
        former = self._outlets.pop(link, None)
        if former is not None:
            former.close()
        outlet = Outlet(lambda: sum(map(len, self._outlets.values())), self._thread.cancel)
        self._outlets[link] = outlet
        try:
            async with aclosing(outlet.slices()) as slices:
                async for piece in slices:
                    yield piece
        finally:
            if self._outlets.get(link) is outlet:
                del self._outlets[link]
            outlet.close()

    async def post(self, link: str, calls: list[Posted], cancelled: list[int]) -> None:
        """Start calls and end others; all else comes over the stream. Raises ReplicaLost where none is open."""
        outlet = self._outlets.get(link)
        if outlet is None:
            raise ReplicaLost(f"no stream of {link} is open here")
        for number in cancelled:
            outlet.cancel(number)
        for posted in calls:
            outlet.admit(posted.number, asyncio.create_task(self._admit(outlet, posted)))

    async def _admit(self, outlet: Outlet, posted: Posted) -> None:
        """Give the call to the engine, or tell why not."""
        call, number = posted.call, posted.number
        try:
            if posted.backbone not in ("", self._backbone_digest):
                raise UnavailableError(
                    "the server's backbone is being replaced; ask again in a moment", code="backbone_changed"
                )
            request = await self._request(call, posted.ref, posted.resumed)
            if request.id in self._refs:
                raise PedroError(f"request id: {request.id!r} is in use; give each request its own", param="id")
            deltas = Deltas(self._tokenizer, self._texts, request, call, str(posted.ref or self._bare))
            self._refs[request.id] = (posted.ref, request.n)
            outlet.open(number, request.id, request.n, deltas)
            try:
                self._thread.submit(request)
            except BaseException:
                del self._refs[request.id]
                raise
        except PedroError as error:
            outlet.refuse(number, error)
        except Exception:
            log.exception("request %s (%s) could not be started", call.trace_id, call.request_id)
            outlet.refuse(number, UnavailableError("the engine failed on this request; try again", code="engine_error"))

    def _hand_out(self, outputs: list[Output]) -> None:
        """Called on the engine's thread, once a step."""
        outlets = list(self._outlets.values())
        for outlet in outlets:
            mine = outputs if len(outlets) == 1 else [output for output in outputs if output.request_id in outlet]
            if mine:
                outlet.take(mine)
        for output in outputs:
            if output.finish_reason is not None:
                ref, unfinished = self._refs.pop(output.request_id)
                if unfinished > 1:
                    self._refs[output.request_id] = ref, unfinished - 1
                self._metrics.finished(ref, output)

    # texts

    async def tokenize(
        self, prompt: str | tuple[Mapping[str, str], ...], add_special_tokens: bool, ref: ModelRef | None
    ) -> TokenizeResult:
        """The ids of a text, or of messages as `ref` (None: the bare backbone) was trained to read them."""
        if isinstance(prompt, str):
            text = await self._raw(prompt, ref) if add_special_tokens else prompt
            ids = await self._encode(text, "prompt", add_special_tokens)
        else:
            ids = await self._render(prompt, ref)
        pieces = self._tokenizer.convert_ids_to_tokens(ids)
        return TokenizeResult(tuple(ids), self._engine.max_length, tuple(pieces))

    async def detokenize(self, ids: tuple[int, ...]) -> str:
        """The text of the ids, special ones included. Raises PedroError for an id outside the vocabulary."""
        size = len(self._tokenizer)
        bad = next((token for token in ids if not 0 <= token < size), None)
        if bad is not None:
            raise PedroError(f"tokens: {bad} is outside the vocabulary of {size:,} tokens", param="tokens")
        return await asyncio.to_thread(self._tokenizer.decode, list(ids), skip_special_tokens=False)

    async def tokenizer_info(self) -> dict[str, Any]:
        """The tokenizer's config as JSON can hold it."""
        return tokenizer_info(self._tokenizer)

    # adapters

    async def residents(self, ref: ModelRef | None = None) -> list[AdapterResidence]:
        """The adapter versions that are here, or the one that `ref` names, if it is."""
        at = {ModelRef.parse(held): state for held, state in self._engine.adapters.residents().items()}
        return [self._residence(held, state) for held, state in at.items() if ref in (None, held)]

    async def load(self, ref: ModelRef, keep: bool) -> list[AdapterResidence]:
        """Returns once `ref` is resident; `keep` pins it. Raises what a request would meet that it cannot serve."""
        pool = self._engine.adapters
        await asyncio.to_thread(pool.pin if keep else pool.load, str(ref), LOAD_TIMEOUT_S)
        return await self.residents(ref)

    async def unpin(self, ref: ModelRef) -> list[AdapterResidence]:
        """Make a pinned adapter one that may be evicted."""
        self._engine.adapters.unpin(str(ref))
        return await self.residents(ref)

    async def unload(self, ref: ModelRef) -> list[AdapterResidence]:
        """Give its memory back, once the requests that hold it have ended."""
        self._engine.adapters.evict(str(ref))
        return await self.residents(ref)

    def _residence(self, ref: ModelRef, at: ResidentAdapter) -> AdapterResidence:
        return AdapterResidence(
            ref.name,
            ref.number,
            ref.digest,
            self.name,
            at.state.value,
            bytes=at.nbytes,
            pinned=at.pinned,
            uses=at.refcount,
        )

    # the replica itself

    async def metrics(self) -> str:
        """Prometheus text."""
        return self._metrics.text()

    def ready(self) -> bool:
        """Whether a request would be taken."""
        return self._thread.alive

    def check_health(self) -> None:
        """Raises where only a new process helps."""
        if not self._thread.alive:
            raise UnavailableError("the engine thread has ended")

    def stats(self) -> dict[str, Any]:
        """The engine's figures."""
        return {**self._engine.stats(), "replica": self.name, "streams": len(self._outlets)}

    def close(self) -> None:
        """End the engine; unfinished requests are told."""
        self._rendering.close()
        self._thread.stop()

    def _fetch(self, named: str) -> Path:
        """The directory of the version and digest that the engine wants. Runs on a loader thread."""
        ref = ModelRef.parse(named)
        try:
            version = self._registry.find(ref)
        except NotFoundError as error:
            raise _gone(ref) from error
        try:
            directory = self._registry.download(version)
        except AdapterError as error:  # the store's fault, not the caller's
            if error.code == DAMAGED:
                raise unusable(named, error) from error
            raise UnavailableError(error.message, param="model", code="adapter_unavailable") from error
        try:
            check_tokenizer(read_manifest(directory), self._tokenizer_digests)
        except AdapterError as error:
            raise unusable(named, error) from error
        return directory

    async def _request(self, call: GenerateCall, ref: ModelRef | None, resumed: tuple[int, ...] = ()) -> Request:
        """The engine's request: the prompt rendered as the adapter was trained, the sampling checked."""
        if call.messages is not None:
            ids = await self._render(call.messages, ref)
        elif isinstance(call.prompt, str):
            ids = await self._encode(await self._raw(call.prompt, ref), "prompt")
        else:
            ids = list(call.prompt or ())
        prompt_logprobs = (call.params.get("logprobs") or 0) if call.echo else None
        params = SamplingParams(**call.params, prompt_logprobs=prompt_logprobs)
        return Request(
            id=call.request_id,
            tenant=call.tenant,
            prompt_ids=ids,
            adapter=None if ref is None else str(ref),
            params=params,
            conditioning_length=call.conditioning_length,
            deadline_s=call.timeout_s,
            apart=call.messages is not None,
            n=call.n,
            resumed_ids=resumed,
        )

    async def _render(self, messages: tuple[Mapping[str, str], ...], ref: ModelRef | None) -> list[int]:
        form = self._plain_format if ref is None else await self._format_of(ref)
        return await self._encode(await self._rendering.prompt(form, messages, ref), "messages")

    async def _raw(self, text: str, ref: ModelRef | None) -> str:
        """A rendered prompt: what it spells is text or special tokens, as in the training of `ref`."""
        self._check_size(text, "prompt")
        if ref is None or not special_tokens(self._tokenizer).cuts(text):
            return text
        try:
            return (await self._format_of(ref)).raw_prompt(text, self._tokenizer)
        except DataError:  # an adapter without a format: its prompts are all its callers' own
            return text

    async def _encode(self, text: str, param: str, add_special_tokens: bool = True) -> list[int]:
        """The prompt's ids. A long text is tokenised on a thread."""
        self._check_size(text, param)

        def encode() -> list[int]:
            if add_special_tokens:
                return encode_prompt(self._tokenizer, text)
            return encode_text(self._tokenizer, text)

        if len(text) <= LONG_TEXT:
            return encode()
        async with self._encoding:
            return await to_its_end(encode)

    def _check_size(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit, before any work is done on it."""
        longest = self._engine.max_length
        least = len(text) // (self._longest_piece * SHRINKAGE)
        if least > longest:
            raise PedroError(
                f"{param}: a prompt of {len(text):,} characters has more than {least:,} tokens, and the context is "
                f"{longest:,} tokens; shorten it",
                param=param,
                code="context_length_exceeded",
            )

    async def _format_of(self, ref: ModelRef) -> PromptFormat:
        form = self._formats.get(ref)
        if form is None:
            directory = await asyncio.to_thread(self._fetch, str(ref))
            form = PromptFormat.from_dict(read_manifest(directory).get("prompt_format") or {})
            self._formats[ref] = form
            if len(self._formats) > CACHED_FORMATS:
                self._formats.popitem(last=False)
        return form


def _gone(ref: ModelRef) -> UnavailableError:
    return UnavailableError(
        f"model: the version {ref.without_digest} that this request was admitted with is gone; ask again"
    )
