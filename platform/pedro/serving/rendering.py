"""Renders prompts beside the event loop: one tenant's template delays nobody else. Knows nothing of engines or HTTP.

The packaged templates and the backbone's own are the operator's and run in this process; any other was written by a
stranger and runs in a worker with bounds. A tenant has one prompt there at a time, so none waits behind a flood of
another's; and a template that went beyond its bounds is refused unseen for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pedro.data.prompt_format import FORMATS, PromptFormat
from pedro.data.special_tokens import Prompt
from pedro.data.template_worker import TemplateBoundsError, TemplateWorker
from pedro.refs import ModelRef

LONG_CHARS, LONG_MESSAGES = 8192, 64  # what takes long enough in this process to hold up the streams of others
FIRST_REFUSAL_S, LAST_REFUSAL_S = 30.0, 3600.0
MAX_REFUSALS = 4096
log = logging.getLogger("pedro.serving")
Messages = tuple[Mapping[str, Any], ...]
T = TypeVar("T")


class Rendering:
    """Of one replica, on its event loop. `trusted` are templates beside the packaged ones."""

    def __init__(self, tokenizer: Any, trusted: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._trusted = {*trusted, *(form.template for form in FORMATS.values())}
        self._worker = TemplateWorker()
        self._free = asyncio.Lock()  # in the order of asking
        self._tenants: dict[str, _Queue] = {}
        self._refusals: OrderedDict[ModelRef, _Refusal] = OrderedDict()

    async def prompt(self, form: PromptFormat, messages: Messages, ref: ModelRef | None) -> Prompt:
        """The prompt of an adapter version (None: of the backbone).

        Raises DataError; TemplateBoundsError where the template does too much.
        """
        if form.template not in self._trusted:
            assert ref is not None, "the backbone's own template is trusted"
            return await self._bounded(form, messages, ref)
        if len(messages) <= LONG_MESSAGES and sum(len(str(m.get("content", ""))) for m in messages) <= LONG_CHARS:
            return form.prompt(messages, self._tokenizer)
        return await asyncio.to_thread(form.prompt, messages, self._tokenizer)

    def close(self) -> None:
        """End the worker."""
        self._worker.close()

    async def _bounded(self, form: PromptFormat, messages: Messages, ref: ModelRef) -> Prompt:
        async with self._turn(ref.tenant):
            refusal = self._refusals.get(ref)
            if refusal is not None and time.monotonic() < refusal.until:
                raise refusal.error.with_traceback(None)
            try:
                return await to_its_end(form.prompt, messages, self._tokenizer, self._worker.render)
            except TemplateBoundsError as error:
                self._refuse(ref, error)
                raise

    @asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[None]:
        queue = self._tenants.setdefault(tenant, _Queue())
        queue.waiting += 1
        try:
            async with queue.lock, self._free:
                yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                del self._tenants[tenant]

    def _refuse(self, ref: ModelRef, error: TemplateBoundsError) -> None:
        times = self._refusals[ref].times + 1 if ref in self._refusals else 1
        for_s = min(FIRST_REFUSAL_S * 2 ** (times - 1), LAST_REFUSAL_S)
        self._refusals[ref] = _Refusal(error, times, time.monotonic() + for_s)
        if len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)
        log.warning("adapter %s: %s; its chats are refused for %g s", ref.without_digest, error, for_s)


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


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0


class _Refusal:
    def __init__(self, error: TemplateBoundsError, times: int, until: float) -> None:
        self.error, self.times, self.until = error, times, until
