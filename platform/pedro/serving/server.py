"""The replica's side of the protocol: one engine, its streams of outputs, its adapters; free of Ray and HTTP."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro import tracing
from pedro.adapter_directory import check_tokenizer, read_manifest
from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.backbones.sharing import obtain_backbone
from pedro.engine.adapter_pool import unusable
from pedro.engine.config import EngineConfig
from pedro.engine.engine import Engine
from pedro.engine.engine_thread import EngineThread, OnLost, ignore
from pedro.engine.kernel_threads import granted_cores
from pedro.engine.request_processor import eos_ids
from pedro.engine.sequence import Output, Request, SamplingParams
from pedro.errors import AdapterError, NotFoundError, PedroError, UnavailableError
from pedro.gateway.backend import AdapterResidence, GenerateCall, TokenizeResult
from pedro.process import configure_serving_process, parse_memory, set_torch_threads
from pedro.refs import ModelRef
from pedro.registry import DAMAGED, Registry, Version
from pedro.serving.answer_shapes import AnswerShapes
from pedro.serving.gone_versions import GoneVersions
from pedro.serving.metrics import ReplicaMetrics
from pedro.serving.outputs import ENGINE_FAILED, DeltaBuilder, OutputStream
from pedro.serving.prompts import PromptProcessor, Turns
from pedro.serving.protocol import ControlRequest, OutputBatch, Prompt, ReplicaLost, SubmitRequest, T
from pedro.serving.tokens import TokenTexts, tokenizer_info
from pedro.serving.tool_shapes import call_shape

if TYPE_CHECKING:
    from pedro.backbone import Backbone
    from pedro.config import Settings
    from pedro.engine.adapter_state import ResidentAdapter
    from pedro.engine.tensor_parallel import TensorParallel
    from pedro.serving.config import ServeConfig

LOAD_TIMEOUT_S = 60.0
MAX_FOUND = 16_384
SPECULATION = {"speculate", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"}
log = logging.getLogger("pedro.serving")


@dataclass
class _Unfinished:
    """A request that the engine has: where its outputs go, its adapter, its choices to finish, what was counted."""

    stream: OutputStream
    ref: ModelRef | None
    choices: int
    resumed: int = 0  # tokens of the answer that another engine made
    prompt_tokens: int = 0
    trace: str = ""  # the span that its own is a part of
    steps: dict[int, deque[tuple[int, int]]] = field(default_factory=dict)
    """Of a traced one the last steps by choice: Unix nanoseconds, tokens."""

    def new_tokens(self, output: Output) -> Output:
        """The last output of a choice with what this engine read and made for it: the choices share their prompt."""
        unread = max(0, output.prompt_tokens - self.prompt_tokens)
        self.prompt_tokens += unread
        return replace(
            output,
            prompt_tokens=unread,
            cached_tokens=min(output.cached_tokens, unread),
            completion_tokens=output.completion_tokens - self.resumed,
        )


class ReplicaServer:
    """Loads the backbone once and serves it with every adapter of the registry. `name` tells it from other replicas.

    Conforms to `ReplicaConnection` and `ReplicaControl` of `pedro.serving.protocol`; an ingress comes by a connection.
    `on_lost` is called where only a new process helps, before requests are told; `sharers`: of the machine's memory.
    """

    def __init__(
        self, config: ServeConfig, settings: Settings, name: str = "local", on_lost: OnLost = ignore, sharers: int = 1
    ) -> None:
        threads = max(1, (config.threads or granted_cores()) // config.tensor_parallel_size)
        configure_serving_process(threads)
        obtain_backbone(settings, config.backbone)
        backbone = resolve_backbone(config.backbone)
        self.name = name
        self._tokenizer_digests = backbone.tokenizer_digests
        self._registry = Registry.open(settings)
        self._registry.connect()  # now rather than under the first request
        self._backbone_digest = backbone.digest
        self._bare = f"{config.model_name}#{backbone.digest}"
        self._tokenizer = load_tokenizer(backbone)
        self._texts = TokenTexts(self._tokenizer)
        self._streams: dict[str, OutputStream] = {}
        self._unfinished: dict[str, _Unfinished] = {}  # by request id
        self._found: dict[ModelRef, Version] = {}
        self._turns = Turns()  # of calls that come in
        split = _split(config, backbone, threads)
        model = load_model(backbone, config.dtype, config.device) if split is None else split.model
        embedding: Any = model.get_input_embeddings()
        self._shapes = AnswerShapes(self._tokenizer, embedding.num_embeddings, eos_ids(model, self._tokenizer))
        self._engine = Engine(
            model,
            self._tokenizer,
            EngineConfig(
                max_batch=config.max_batch,
                max_length=config.max_length,
                adapter_bytes=int(config.adapter_budget_mb * 2**20),
                kv_memory=None if config.kv_memory is None else parse_memory(str(config.kv_memory)),
                sharers=sharers,
                prefix_bytes=int(config.prefix_cache_mb * 2**20),
                share_bare_prefixes=config.share_bare_prefixes,
                max_waiting=config.max_waiting,
                tenant_weights=config.tenant_weights,
                threads=threads,
                weights=config.weights,
                **config.model_dump(include=SPECULATION),
            ),
            self._fetch,
            backbone.digest,
            split,
        )
        log.info("replica %s: %s", name, self._engine.stats()["room"])
        if self._engine.stats()["kernel"] == "native":
            set_torch_threads(1)  # what is left to PyTorch is small, and its threads wait for those put aside
        self._prompts = PromptProcessor(self._tokenizer, self._engine.max_length, self._fetch)
        self._metrics = ReplicaMetrics(name, config.model_name, self._engine.stats)
        self._thread = EngineThread(self._engine, self._hand_out, on_lost)
        self._thread.start()
        pool = self._engine.adapters
        self._gone = GoneVersions(self._registry, pool.residents, pool.evict, self._engine.forget_prefixes)
        self._gone.start()

    # calls

    async def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        """The outputs of all calls submitted under `stream_id`; whoever stops reading ends them."""
        former = self._streams.pop(stream_id, None)
        if former is not None:
            former.close()
        stream = OutputStream(lambda: sum(map(len, self._streams.values())), self._thread.cancel)
        self._streams[stream_id] = stream
        try:
            async with aclosing(stream.batches()) as batches:
                async for batch in batches:
                    yield batch
        finally:
            if self._streams.get(stream_id) is stream:
                del self._streams[stream_id]
            stream.close()

    async def submit(self, stream_id: str, requests: list[SubmitRequest], cancelled: list[int]) -> None:
        """Start calls and end others; all else comes over the stream. Raises ReplicaLost where none is open."""
        stream = self._streams.get(stream_id)
        if stream is None:
            raise ReplicaLost(f"no stream of {stream_id} is open here", blameless=True)
        for number in cancelled:
            stream.cancel(number)
        for request in requests:
            stream.admit(request.number, asyncio.create_task(self._admit(stream, request)))

    async def ask(self, request: ControlRequest[T]) -> T:
        """What is no generation."""
        return await request.perform(self)

    async def _admit(self, stream: OutputStream, submitted: SubmitRequest) -> None:
        """Give the call to the engine, or tell why not."""
        call, number = submitted.call, submitted.number
        await self._turns.next(call.tenant)
        try:
            if submitted.backbone not in ("", self._backbone_digest):
                raise UnavailableError(
                    "the server's backbone is being replaced; ask again in a moment", code="backbone_changed"
                )
            request = await self._request(call, submitted.ref, submitted.resumed)
            if request.id in self._unfinished:
                raise PedroError(f"request id: {request.id!r} is in use; give each request its own", param="id")
            deltas = DeltaBuilder(self._tokenizer, self._texts, request, call, str(submitted.ref or self._bare))
            self._unfinished[request.id] = _Unfinished(
                stream, submitted.ref, request.n, len(submitted.resumed), trace=submitted.trace
            )
            stream.open(number, request.id, request.n, deltas)
            try:
                self._thread.submit(request)
            except BaseException:
                del self._unfinished[request.id]
                raise
        except PedroError as error:
            stream.refuse(number, error)
        except Exception:
            log.exception("request %s (%s) could not be started", call.trace_id, call.request_id)
            stream.refuse(number, UnavailableError(ENGINE_FAILED, code="engine_error"))

    def _hand_out(self, outputs: list[Output]) -> None:
        """Called on the engine's thread, once a step."""
        of_streams: dict[OutputStream, list[Output]] = {}
        for output in outputs:
            request = self._unfinished[output.request_id]
            of_streams.setdefault(request.stream, []).append(output)
            if request.trace:
                self._trace(request, output)
        for stream, of_stream in of_streams.items():
            stream.take(of_stream)
        for output in outputs:
            if output.finish_reason is not None:
                request = self._unfinished[output.request_id]
                request.choices -= 1
                if not request.choices:
                    del self._unfinished[output.request_id]
                self._metrics.finished(request.ref, request.new_tokens(output))

    def _trace(self, request: _Unfinished, output: Output) -> None:
        """Note the step, and at an answer's end send what it was made of."""
        steps = request.steps.setdefault(output.index, deque(maxlen=tracing.MAX_STEPS))
        if output.token_ids:
            steps.append((time.time_ns(), len(output.token_ids)))
        if output.finish_reason is None or tracing.TRACER is None or output.timing is None:
            return
        facts = {
            "request": output.request_id,
            "model": str(request.ref or self._bare),
            "finish_reason": output.finish_reason,
            "prompt_tokens": output.prompt_tokens,
            "cached_tokens": output.cached_tokens,
            "completion_tokens": output.completion_tokens,
        }
        tracing.TRACER.answered(request.trace, output.timing, request.steps.pop(output.index), facts)

    # texts

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool, ref: ModelRef | None) -> TokenizeResult:
        """The ids of a text, or of messages as `ref` (None: the bare backbone) was trained to read them."""
        if isinstance(prompt, str):
            ids = await self._prompts.text_ids(prompt, ref, add_special_tokens)
        else:
            ids = await self._prompts.message_ids(prompt, ref)
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

    async def residents(self) -> list[AdapterResidence]:
        """The adapter versions that are here."""
        return self._residences(None)

    def _residences(self, ref: ModelRef | None) -> list[AdapterResidence]:
        """Of all versions that are here, or of the one that `ref` names, if it is."""
        at = {ModelRef.parse(held): state for held, state in self._engine.adapters.residents().items()}
        return [self._residence(held, state) for held, state in at.items() if ref in (None, held)]

    async def load(self, ref: ModelRef, pin: bool) -> list[AdapterResidence]:
        """Returns once `ref` is resident; `pin` keeps it so. Raises what a request would meet that it cannot serve."""
        pool = self._engine.adapters
        await asyncio.to_thread(pool.pin if pin else pool.load, str(ref), LOAD_TIMEOUT_S)
        return self._residences(ref)

    async def unpin(self, ref: ModelRef) -> list[AdapterResidence]:
        """Make a pinned adapter one that may be evicted."""
        self._engine.adapters.unpin(str(ref))
        return self._residences(ref)

    async def unload(self, ref: ModelRef) -> list[AdapterResidence]:
        """Give its memory back, once the requests that hold it have ended."""
        self._engine.adapters.evict(str(ref))
        return self._residences(ref)

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
        return {**self._engine.stats(), "replica": self.name, "streams": len(self._streams)}

    def close(self) -> None:
        """End the engine; unfinished requests are told."""
        self._gone.close()
        self._prompts.close()
        self._shapes.close()
        self._thread.stop()

    def _fetch(self, named: str) -> Path:
        """The directory of the version and digest that the engine wants. Runs on a loader thread."""
        version = self._find(ModelRef.parse(named))
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

    def _find(self, ref: ModelRef) -> Version:
        """The version that `ref` names. While the database is away, one that was found before is what it was: versions
        do not change, and others may have taken its room since."""
        try:
            version = self._found[ref] = self._registry.find(ref)
        except NotFoundError as error:
            self._found.pop(ref, None)
            raise _gone(ref) from error
        except UnavailableError:
            known = self._found.get(ref)
            if known is None:
                raise
            return known
        if len(self._found) > MAX_FOUND:
            self._found.pop(next(iter(self._found)), None)
        return version

    async def _request(self, call: GenerateCall, ref: ModelRef | None, resumed: tuple[int, ...] = ()) -> Request:
        """The engine's request: the prompt rendered as the adapter was trained, the sampling checked."""
        length = call.conditioning_length
        if call.messages is not None:
            tools = () if call.tools is None else call.tools.tools
            ids, length = await self._prompts.conditioned(call.messages, ref, call.tenant, tools, call.conditioning)
        elif isinstance(call.prompt, str):
            ids = await self._prompts.text_ids(call.prompt, ref, tenant=call.tenant)
        else:
            ids = list(call.prompt or ())
        apart = call.messages is not None
        prompt_logprobs = (call.params.get("logprobs") or 0) if call.echo else None
        params = SamplingParams(**call.params, prompt_logprobs=prompt_logprobs)
        shape = call.shape
        if call.tools is not None and call.tools.may_call:
            shape = call_shape(await self._prompts.template(ref), call.tools)
        new_mask = None if shape is None else await self._shapes.new_mask(shape, call.tenant, apart)
        return Request(
            id=call.request_id,
            tenant=call.tenant,
            prompt_ids=ids,
            adapter=None if ref is None else str(ref),
            params=params,
            conditioning_length=length,
            deadline_s=call.timeout_s,
            apart=apart,
            n=call.n,
            resumed_ids=resumed,
            new_mask=new_mask,
            cache_salt=call.cache_salt,
        )


def _gone(ref: ModelRef) -> UnavailableError:
    gone = f"model: the version {ref.without_digest} that this request was admitted with is gone; ask again"
    return UnavailableError(gone, code="adapter_unavailable")


def _split(config: ServeConfig, backbone: Backbone, threads: int) -> TensorParallel | None:
    """The ranks that share the backbone, where there are several; this process is the first of them."""
    if config.tensor_parallel_size == 1:
        return None
    from pedro.engine.tensor_parallel import TensorParallel

    return TensorParallel(backbone, config.tensor_parallel_size, config.dtype, config.device, threads)
