"""Prompts as token ids: messages rendered in their adapter's format, texts encoded as in training.

One tenant's template delays no other tenant. Packaged templates and the backbone's own are trusted and run in this
process; all others run in a worker with limits. A tenant has one prompt there at a time, so none waits behind another's
flood; a template that exceeded its limits is refused for a while without running it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pedro.adapter_directory import CONFIG, read_manifest
from pedro.data import templates
from pedro.data.conditioning import KEPT_HEADS, SYSTEM, asked, check_head, find_head_end, head_of
from pedro.data.example_text import check_carried
from pedro.data.prompt_format import FORMATS, PromptFormat, Run, encode_prompt, encode_text, format_for_shape
from pedro.data.row_shapes import RowShape
from pedro.data.special_tokens import Prompt, special_tokens
from pedro.data.template_worker import TemplateBoundsError, TemplateWorker
from pedro.engine.adapter_pool import RETRY_EVERY_S, RETRY_FOR_S, as_answered, may_pass
from pedro.errors import DataError, PedroError

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer
    from pedro.refs import ModelRef

CACHED_FORMATS = 4096
LONG_TEXT = 8192  # characters; tokenising more would delay other streams
SHRINKAGE = 4  # by which a tokenizer's normalisation could shorten a text
LONG_CHARS, LONG_MESSAGES = 8192, 64  # more would delay other streams of this process
FROM_PROMPT, EVERYTHING = "PEDRO", "prompt"  # an adapter's `peft_type` and `apply_to` (`methods/pedro/config.py`)
FIRST_REFUSAL_S, LAST_REFUSAL_S = 30.0, 3600.0
MAX_REFUSALS = 4096
log = logging.getLogger("pedro.serving")
Messages = tuple[Mapping[str, Any], ...]
T = TypeVar("T")


class Turns:
    """Takes calls in order of arrival: a tenant's calls wait for one another, but never block another tenant's. For one
    event loop."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Queue] = {}

    @asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """At most one call per tenant is inside."""
        queue = self._tenants.setdefault(tenant, _Queue())
        queue.waiting += 1
        try:
            async with queue.lock:
                yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                del self._tenants[tenant]

    async def next(self, tenant: str) -> None:
        """Returns when the call may continue: one per tenant in each pass of the event loop, which admits new arrivals.

        Later waits of the call do not block its tenant's other calls.
        """
        async with self.of(tenant):
            await asyncio.sleep(0)


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class PromptProcessor:
    """The prompts of one replica, on its event loop. `fetch` returns the directory of an adapter version; it may
    block."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, fetch: Callable[[str], Path]) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._fetch = fetch
        self._coming: dict[ModelRef, asyncio.Task[Path]] = {}
        self._longest_piece = max(map(len, tokenizer.get_vocab()))
        self._encoding = asyncio.Semaphore(2)
        self._encoding_turns = Turns()
        self._plain_format = format_for_shape(RowShape.MESSAGES, tokenizer)
        self._renderer = TemplateRenderer(tokenizer, [self._plain_format.template])
        self._adapters: OrderedDict[ModelRef, _Adapter] = OrderedDict()
        self._heads: OrderedDict[tuple[ModelRef, str], list[int]] = OrderedDict()

    async def message_ids(
        self, messages: Messages, ref: ModelRef | None, tenant: str = "", tools: Messages = ()
    ) -> list[int]:
        """The ids of messages in the format of `ref` (None: the bare backbone); `tenant` is the caller."""
        return (await self.conditioned(messages, ref, tenant, tools))[0]

    async def conditioned(
        self,
        messages: Messages,
        ref: ModelRef | None,
        tenant: str = "",
        tools: Messages = (),
        conditioning: str | None = None,
    ) -> tuple[list[int], int | None]:
        """`message_ids`, and how many of them condition the vectors, if `conditioning` differs from the adapter's
        default (else None). Raises DataError if that is impossible."""
        if ref is None:
            return await self._written(self._plain_format, messages, None, tenant, tools), None
        adapter = await self._adapter(ref)
        form, told = adapter.form, False
        if conditioning is not None and adapter.scales is not None:
            form, told = await self._asked_form(adapter, ref, conditioning, tenant)
        ids = await self._written(form, messages, ref, tenant, tools)
        if not form.head_end or len(ids) > self._max_length:  # longer ones are refused by the engine and not cached
            return ids, None
        head = await self._head(form, messages, ref, tenant, tools)
        check_head(form, head, ids)
        return ids, len(head) if told else None

    async def template(self, ref: ModelRef | None) -> str:
        """The chat template of `ref`."""
        return (self._plain_format if ref is None else (await self._adapter(ref)).form).template

    async def text_ids(
        self, text: str, ref: ModelRef | None, add_special_tokens: bool = True, tenant: str = ""
    ) -> list[int]:
        """The ids of a text as in the training of `ref`; without `add_special_tokens`, of the text only."""
        prompt = await self._raw(text, ref) if add_special_tokens else text
        return await self._encode(prompt, "prompt", tenant, add_special_tokens)

    def close(self) -> None:
        """End the rendering worker."""
        self._renderer.close()

    async def _written(
        self, form: PromptFormat, messages: Messages, ref: ModelRef | None, tenant: str, tools: Messages
    ) -> list[int]:
        return await self._encode(await self._renderer.prompt(form, messages, ref, tools, tenant), "messages", tenant)

    async def _head(
        self, form: PromptFormat, messages: Messages, ref: ModelRef, tenant: str, tools: Messages
    ) -> list[int]:
        """The ids of their system turn, which conditions the adapter, as in any of its prompts. Recent ones are cached:
        all turns of a conversation share one."""
        alone = asked(messages)
        key = ref, hashlib.sha256(json.dumps([messages[0], tools]).encode()).hexdigest()
        head = self._heads.pop(key, None)
        if head is None:
            head = head_of(form, [await self._written(form, tuple(turns), ref, tenant, tools) for turns in alone])
        self._heads[key] = head
        if len(self._heads) > KEPT_HEADS:
            self._heads.popitem(last=False)
        return head

    async def _raw(self, text: str, ref: ModelRef | None) -> str:
        """Encode a rendered prompt, with or without parsing special tokens, as in the training of `ref`."""
        self._check_size(text, "prompt")
        if ref is None or not special_tokens(self._tokenizer).cuts(text):
            return text
        try:
            return (await self._adapter(ref)).form.raw_prompt(text, self._tokenizer)
        except DataError:  # an adapter without a format: prompts are plain text
            return text

    async def _encode(self, text: str, param: str, tenant: str, add_special_tokens: bool = True) -> list[int]:
        """The prompt's ids. Long texts are tokenised on a thread, one per tenant at a time."""
        self._check_size(text, param)

        def encode() -> list[int]:
            if add_special_tokens:
                return encode_prompt(self._tokenizer, text)
            return encode_text(self._tokenizer, text)

        if len(text) <= LONG_TEXT:
            return encode()
        async with self._encoding_turns.of(tenant), self._encoding:
            return await to_its_end(encode)

    def _check_size(self, text: str, param: str) -> None:
        """Refuse a text that cannot fit, before any work is done on it."""
        longest = self._max_length
        least = len(text) // (self._longest_piece * SHRINKAGE)
        if least > longest:
            raise PedroError(
                f"{param}: a prompt of {len(text):,} characters has more than {least:,} tokens, and the context is "
                f"{longest:,} tokens; shorten it",
                param=param,
                code="context_length_exceeded",
            )

    async def _asked_form(
        self, adapter: _Adapter, ref: ModelRef, conditioning: str, tenant: str
    ) -> tuple[PromptFormat, bool]:
        """The format, with the end of its system turns if one conditions, and whether only the request says so."""
        form = adapter.form
        if form.head_end and conditioning != SYSTEM:
            raise DataError(
                f"conditioning: the adapter was conditioned on its system turn; send {SYSTEM!r}, or leave it out",
                param="conditioning",
            )
        if form.head_end or conditioning != SYSTEM:
            return form, False
        if adapter.scales != EVERYTHING:
            raise DataError(
                "conditioning: the adapter only acts on answers (apply_to: answer), which fixes what conditions it; "
                "leave it out",
                param="conditioning",
            )
        if adapter.headed is None:
            try:
                adapter.headed = await self._renderer.headed(form, ref, tenant)
            except TemplateBoundsError:
                raise
            except DataError:
                adapter.headed = form
        if not adapter.headed.head_end:
            raise DataError(
                f"conditioning: the adapter's prompt format, {form.id}, has no system turn that could condition it; "
                "leave it out",
                param="conditioning",
            )
        return adapter.headed, True

    async def _adapter(self, ref: ModelRef) -> _Adapter:
        adapter = self._adapters.get(ref)
        if adapter is None:
            directory = await self._directory(ref)
            form = PromptFormat.from_dict(read_manifest(directory).get("prompt_format") or {})
            adapter = self._adapters[ref] = _Adapter(form, _scales(directory))
            if len(self._adapters) > CACHED_FORMATS:
                self._adapters.popitem(last=False)
        return adapter

    async def _directory(self, ref: ModelRef) -> Path:
        """As `_fetched`; all requests of a version wait for the same attempts."""
        coming = self._coming.get(ref)
        if coming is None:
            coming = self._coming[ref] = asyncio.create_task(self._fetched(ref))
            coming.add_done_callback(partial(self._came, ref))
        return await asyncio.shield(coming)

    def _came(self, ref: ModelRef, coming: asyncio.Task[Path]) -> None:
        del self._coming[ref]
        if not coming.cancelled():
            coming.exception()  # else asyncio logs it where nobody waits any more

    async def _fetched(self, ref: ModelRef) -> Path:
        """The version's files on this host; what keeps them away is waited for, as the engine does."""
        until = time.monotonic() + RETRY_FOR_S
        while True:
            try:
                return await asyncio.to_thread(self._fetch, str(ref))
            except Exception as error:
                if not may_pass(error):
                    raise
                if time.monotonic() >= until:
                    raise as_answered(str(ref), error) from error
            await asyncio.sleep(RETRY_EVERY_S)


def _scales(directory: Path) -> str | None:
    """`apply_to` of an adapter that generates vectors from the prompt; None for any other."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except FileNotFoundError:  # a whole model
        return None
    return config.get("apply_to", EVERYTHING) if config.get("peft_type") == FROM_PROMPT else None


@dataclass
class _Adapter:
    """Cached data of a version."""

    form: PromptFormat
    scales: str | None
    headed: PromptFormat | None = None
    """The format with the end of its system turns, once a request needed it; unchanged if there is none."""


class TemplateRenderer:
    """The templates of one replica, on its event loop. `trusted`: templates besides the packaged ones."""

    def __init__(self, tokenizer: Tokenizer, trusted: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._trusted = {*trusted, *(form.template for form in FORMATS.values())}
        self._worker = TemplateWorker()
        self._free = asyncio.Lock()  # first come, first served
        self._turns = Turns()  # by owner of the adapter
        self._asking = Turns()  # by caller
        self._refusals: OrderedDict[ModelRef, _Refusal] = OrderedDict()

    async def prompt(
        self, form: PromptFormat, messages: Messages, ref: ModelRef | None, tools: Messages = (), tenant: str = ""
    ) -> Prompt:
        """The prompt of an adapter version (None: of the backbone). `tenant`, the caller, has one at a time on a
        thread.

        Raises DataError, also if the template omits tools, calls or results; TemplateBoundsError if it exceeds its
        limits.
        """
        if form.template not in self._trusted:
            assert ref is not None, "the backbone's own template is trusted"
            return await self._bounded(ref, partial(self._prompt, form, messages, tools))
        short = len(messages) <= LONG_MESSAGES and sum(len(str(m.get("content", ""))) for m in messages) <= LONG_CHARS
        if short and not tools and _plain(messages):
            return form.prompt(messages, self._tokenizer)
        async with self._asking.of(tenant):
            return await to_its_end(self._prompt, form, messages, tools, templates.render)

    async def headed(self, form: PromptFormat, ref: ModelRef, tenant: str) -> PromptFormat:
        """The format with the end of its system turns, found by rendering some. Raises DataError as `prompt` does."""
        if form.template not in self._trusted:
            end = await self._bounded(ref, partial(find_head_end, form, self._tokenizer))
        else:
            async with self._asking.of(tenant):
                end = await to_its_end(find_head_end, form, self._tokenizer)
        return replace(form, head_end=end)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    def _prompt(self, form: PromptFormat, messages: Messages, tools: Messages, run: Run) -> Prompt:
        if tools or not _plain(messages):
            check_carried(form, [dict(message) for message in messages], [dict(tool) for tool in tools], run=run)
        return form.prompt(messages, self._tokenizer, run, tools)

    async def _bounded(self, ref: ModelRef, render: Callable[[Run], T]) -> T:
        async with self._turns.of(ref.tenant), self._free:
            refusal = self._refusals.get(ref)
            if refusal is not None and time.monotonic() < refusal.until:
                raise refusal.error.with_traceback(None)
            try:
                return await to_its_end(render, self._worker.render)
            except TemplateBoundsError as error:
                self._refuse(ref, error)
                raise

    def _refuse(self, ref: ModelRef, error: TemplateBoundsError) -> None:
        times = self._refusals[ref].times + 1 if ref in self._refusals else 1
        for_s = min(FIRST_REFUSAL_S * 2 ** (times - 1), LAST_REFUSAL_S)
        self._refusals[ref] = _Refusal(error, times, time.monotonic() + for_s)
        if len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)
        log.warning("adapter %s: %s; its chats are refused for %g s", ref.without_digest, error, for_s)


def _plain(messages: Messages) -> bool:
    """Whether they only have roles and texts."""
    return all(len(message) == 2 for message in messages)


async def to_its_end(function: Callable[..., T], *arguments: Any) -> T:
    """The result of `function`, run on a thread. A cancelled caller leaves only after it has ended.

    Otherwise clients that repeatedly send requests and disconnect could occupy every thread of the process.
    """
    work = asyncio.create_task(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        error = work.exception()
        if error is not None:
            raise error from None
        raise


class _Refusal:
    def __init__(self, error: TemplateBoundsError, times: int, until: float) -> None:
        self.error, self.times, self.until = error, times, until
