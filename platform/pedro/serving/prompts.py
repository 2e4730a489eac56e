"""Prompts as token ids: messages rendered by their adapter's own format, texts encoded as in training.

One tenant's template delays nobody else. The packaged templates and the backbone's own are the operator's and run in
this process; any other was written by a stranger and runs in a worker with bounds. A tenant has one prompt there at a
time, so none waits behind a flood of another's; and a template that went beyond its bounds is refused unseen for a
while.
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
LONG_TEXT = 8192  # characters; tokenising more takes long enough to hold up the streams of others
SHRINKAGE = 4  # how much shorter a tokenizer's normalisation could make a text
LONG_CHARS, LONG_MESSAGES = 8192, 64  # what takes long enough in this process to hold up the streams of others
FROM_PROMPT, EVERYTHING = "PEDRO", "prompt"  # an adapter's `peft_type` and `apply_to` (`methods/pedro/config.py`)
FIRST_REFUSAL_S, LAST_REFUSAL_S = 30.0, 3600.0
MAX_REFUSALS = 4096
log = logging.getLogger("pedro.serving")
Messages = tuple[Mapping[str, Any], ...]
T = TypeVar("T")


class Turns:
    """Of what one place does for calls, in the order of asking: a tenant's wait for one another, never in front of
    another tenant's. On one event loop."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Queue] = {}

    @asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """While inside, no other call of the tenant is."""
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
        """Returns when the call may go on: one of each tenant in a pass of the event loop, which sees who came since.

        What it waits for afterwards holds up none of its tenant's other calls.
        """
        async with self.of(tenant):
            await asyncio.sleep(0)


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class PromptProcessor:
    """Of one replica, on its event loop. `fetch` gives the directory of an adapter version; it may block."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, fetch: Callable[[str], Path]) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._fetch = fetch
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
        """Of messages as `ref` (None: the bare backbone) was trained to read them; `tenant` is the one who asks."""
        return (await self.conditioned(messages, ref, tenant, tools))[0]

    async def conditioned(
        self,
        messages: Messages,
        ref: ModelRef | None,
        tenant: str = "",
        tools: Messages = (),
        conditioning: str | None = None,
    ) -> tuple[list[int], int | None]:
        """`message_ids`, and from how many of them the vectors are to come, where `conditioning` asks for what the
        adapter does not by itself (else None). Raises DataError for what cannot be."""
        if ref is None:
            return await self._written(self._plain_format, messages, None, tenant, tools), None
        adapter = await self._adapter(ref)
        form, told = adapter.form, False
        if conditioning is not None and adapter.scales is not None:
            form, told = await self._asked_form(adapter, ref, conditioning, tenant)
        ids = await self._written(form, messages, ref, tenant, tools)
        if not form.head_end or len(ids) > self._max_length:  # the engine refuses what is longer; of it nothing is kept
            return ids, None
        head = await self._head(form, messages, ref, tenant, tools)
        check_head(form, head, ids)
        return ids, len(head) if told else None

    async def template(self, ref: ModelRef | None) -> str:
        """The template of chats with `ref`."""
        return (self._plain_format if ref is None else (await self._adapter(ref)).form).template

    async def text_ids(
        self, text: str, ref: ModelRef | None, add_special_tokens: bool = True, tenant: str = ""
    ) -> list[int]:
        """Of a text as in the training of `ref`; without `add_special_tokens`, of the text alone."""
        prompt = await self._raw(text, ref) if add_special_tokens else text
        return await self._encode(prompt, "prompt", tenant, add_special_tokens)

    def close(self) -> None:
        """End the worker that renders."""
        self._renderer.close()

    async def _written(
        self, form: PromptFormat, messages: Messages, ref: ModelRef | None, tenant: str, tools: Messages
    ) -> list[int]:
        return await self._encode(await self._renderer.prompt(form, messages, ref, tools, tenant), "messages", tenant)

    async def _head(
        self, form: PromptFormat, messages: Messages, ref: ModelRef, tenant: str, tools: Messages
    ) -> list[int]:
        """What their system turn is in any prompt of the adapter's, which it is conditioned on. Those used last are
        kept: a conversation has the same one in all of its turns."""
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
        """A rendered prompt: what it spells is text or special tokens, as in the training of `ref`."""
        self._check_size(text, "prompt")
        if ref is None or not special_tokens(self._tokenizer).cuts(text):
            return text
        try:
            return (await self._adapter(ref)).form.raw_prompt(text, self._tokenizer)
        except DataError:  # an adapter without a format: its prompts are all its callers' own
            return text

    async def _encode(self, text: str, param: str, tenant: str, add_special_tokens: bool = True) -> list[int]:
        """The prompt's ids. A long text is tokenised on a thread, one of each tenant at a time."""
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
        """The format, with what ends its system turns if one is to condition, and whether the request alone says so."""
        form = adapter.form
        if form.head_end and conditioning != SYSTEM:
            raise DataError(
                f"conditioning: the adapter was trained on its system turn alone; send {SYSTEM!r}, or leave it out",
                param="conditioning",
            )
        if form.head_end or conditioning != SYSTEM:
            return form, False
        if adapter.scales != EVERYTHING:
            raise DataError(
                "conditioning: the adapter acts on answers alone (apply_to: answer), whose place follows from what "
                "conditions it; leave it out",
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
                f"conditioning: the adapter's prompt format, {form.id}, writes no system turn that could condition "
                "it; leave it out",
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
    """What an adapter that makes its vectors from the prompt acts on (`apply_to`); None for any other."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except FileNotFoundError:  # a whole model
        return None
    return config.get("apply_to", EVERYTHING) if config.get("peft_type") == FROM_PROMPT else None


@dataclass
class _Adapter:
    """What is known of a version here."""

    form: PromptFormat
    scales: str | None
    headed: PromptFormat | None = None
    """The format with what ends its system turns, once a request asked for that; as it is if nothing does."""


class TemplateRenderer:
    """Of one replica, on its event loop. `trusted` are templates beside the packaged ones."""

    def __init__(self, tokenizer: Tokenizer, trusted: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._trusted = {*trusted, *(form.template for form in FORMATS.values())}
        self._worker = TemplateWorker()
        self._free = asyncio.Lock()  # in the order of asking
        self._turns = Turns()  # of whose adapter it is
        self._asking = Turns()  # of who asks
        self._refusals: OrderedDict[ModelRef, _Refusal] = OrderedDict()

    async def prompt(
        self, form: PromptFormat, messages: Messages, ref: ModelRef | None, tools: Messages = (), tenant: str = ""
    ) -> Prompt:
        """The prompt of an adapter version (None: of the backbone). `tenant` asks, and has one at a time on a thread.

        Raises DataError, also where the template leaves out tools, calls or results; TemplateBoundsError where it does
        too much.
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
        """The format with what ends its system turns; some are rendered for it. Raises DataError as `prompt` does."""
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
    """Whether they are roles and texts alone."""
    return all(len(message) == 2 for message in messages)


async def to_its_end(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` returns on a thread. A caller that is cancelled leaves once it ended, with what it raised.

    Else whoever asks and leaves, again and again, would hold every thread of the process.
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
