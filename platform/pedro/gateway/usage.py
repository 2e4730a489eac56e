"""One gateway's part of the usage ledger: sums each call's usage and writes it to the store in batches.

No request waits for the database. A failed batch is kept and retried; meanwhile at most `MAX_SUMS` sums are kept,
beyond that only per tenant. A killed gateway loses what it has not written: a second's worth, or everything since the
database went away. Independent of texts and engines.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

from pedro.errors import PedroError
from pedro.store import Usage

if TYPE_CHECKING:
    from pedro.store import Store

FLUSH_EVERY_S = 1.0
RETRY_S = 2.0
LAST_FLUSH_S = 10.0  # how long a stopping gateway waits for the database
MAX_SUMS = 20_000
SEVERAL = "(several)"  # the model of combined sums
MAX_MODEL = 200  # characters, as in the ledger
log = logging.getLogger("pedro.gateway")
Key = tuple[str, str, str, str]


class CallMeter:
    """One call's usage so far: totals, which only grow.

    If a call is read to its end, its deltas have the totals. If it is abandoned or fails, it may have used more than
    was seen: then the backend `expect`s a final count, and is `settled` within seconds, with or without it. All on one
    event loop.
    """

    def __init__(self) -> None:
        self.model = ""  # tenant.adapter, or the backbone's name; empty until resolved
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self._expected = 0
        self._then: Callable[[], None] = lambda: None

    @property
    def is_settled(self) -> bool:
        """Whether no final count is pending."""
        return not self._expected

    def count(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> None:
        """Raise the totals to at least these."""
        self.prompt_tokens = max(self.prompt_tokens, prompt_tokens)
        self.cached_tokens = max(self.cached_tokens, cached_tokens)
        self.completion_tokens = max(self.completion_tokens, completion_tokens)

    def expect(self) -> None:
        """A final count is pending although the call was abandoned."""
        self._expected += 1

    def settled(self) -> None:
        """The final count arrived, or will not."""
        self._expected -= 1
        if not self._expected:
            self._then()

    def when_settled(self, then: Callable[[], None]) -> None:
        """Call `then` once no final count is pending."""
        self._then = then


class UsageEntry:
    """One request's usage: `begin`, then `end` once it is answered or has failed."""

    def __init__(self, ledger: UsageLedger, tenant: str, key_id: str, model: str) -> None:
        self._ledger = ledger
        self.tenant, self.key_id, self._model = tenant, key_id, model
        self._meters: Sequence[CallMeter] = ()
        self._refresh: Callable[[], None] = lambda: None

    def begin(self, meters: Sequence[CallMeter], refresh: Callable[[], None]) -> None:
        """`meters` are those of its calls; `refresh` updates them from the deltas seen."""
        self._meters, self._refresh = meters, refresh
        self._ledger.opened(self)

    def end(self) -> None:
        """Record it, at once or when the last pending count has arrived."""
        self._refresh()
        for meter in self._meters:
            meter.when_settled(self._enter)
        self._enter()

    def give_up(self) -> None:
        """Record what is known so far."""
        self._refresh()
        self._ledger.add(self)

    def _enter(self) -> None:
        if all(meter.is_settled for meter in self._meters):
            self._ledger.add(self)

    def used(self, day: str) -> Usage:
        """As a row of the ledger."""
        model = next((meter.model for meter in self._meters if meter.model), self._model)
        return Usage(
            day,
            self.tenant,
            model[:MAX_MODEL],
            self.key_id,
            requests=1,
            prompt_tokens=sum(meter.prompt_tokens for meter in self._meters),
            cached_tokens=sum(meter.cached_tokens for meter in self._meters),
            completion_tokens=sum(meter.completion_tokens for meter in self._meters),
        )


class UsageLedger:
    """For one event loop; the database is used on threads. `clock` gives Unix seconds; days are UTC."""

    def __init__(
        self,
        store: Store,
        registry: CollectorRegistry,
        flush_every_s: float = FLUSH_EVERY_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._flush_every_s = flush_every_s
        self._clock = clock
        self._writer = secrets.token_hex(16)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-usage")  # not delayed by readers
        self._open: set[UsageEntry] = set()
        self._sums: dict[Key, Usage] = {}
        self._batch: tuple[int, list[Usage]] | None = None  # being written, or to be retried
        self._last_number = 0
        self._flushing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        unwritten = Gauge(
            "pedro_gateway_usage_unwritten_requests",
            "Requests whose usage is not in the database yet.",
            registry=registry,
        )
        unwritten.set_function(lambda: self.unwritten)
        self._failures = Counter(
            "pedro_gateway_usage_write_failures", "Batches of usage that could not be written.", registry=registry
        )

    @property
    def unwritten(self) -> int:
        """Answered requests that are not in the database yet."""
        batch = self._batch[1] if self._batch else []
        return sum(used.requests for used in [*self._sums.values(), *batch])

    def entry(self, tenant: str, key_id: str, model: str) -> UsageEntry:
        """The entry of a request with this key; `model` is the requested name until it is resolved."""
        return UsageEntry(self, tenant, key_id, model)

    def opened(self, entry: UsageEntry) -> None:
        """Register a request, to be recorded when it has ended."""
        self._open.add(entry)

    def add(self, entry: UsageEntry) -> None:
        """Record a request, once. Requests that used nothing, such as refused ones, are not recorded."""
        if entry not in self._open:
            return
        self._open.discard(entry)
        used = entry.used(time.strftime("%Y-%m-%d", time.gmtime(self._clock())))
        if used.prompt_tokens or used.completion_tokens:
            self._add(used)
            if self._flushing is None or self._flushing.done():
                self._flushing = asyncio.create_task(self._flush(), context=Context())  # in no request's context

    async def close(self) -> None:
        """Write everything, including unfinished requests; waits for the database, up to a limit."""
        for entry in list(self._open):
            entry.give_up()
        self._closing.set()
        if self._flushing is not None:
            await asyncio.wait({self._flushing}, timeout=LAST_FLUSH_S)
        if self.unwritten:
            log.error("the usage of %d requests could not be written and is lost", self.unwritten)
        self._thread.shutdown(wait=False)

    def _add(self, used: Usage) -> None:
        key = (used.day, used.tenant, used.model, used.key_id)
        if key not in self._sums and len(self._sums) >= MAX_SUMS:
            key = (used.day, used.tenant, SEVERAL, "")
        before = self._sums.get(key, Usage(*key))
        self._sums[key] = Usage(
            *key,
            requests=before.requests + used.requests,
            prompt_tokens=before.prompt_tokens + used.prompt_tokens,
            cached_tokens=before.cached_tokens + used.cached_tokens,
            completion_tokens=before.completion_tokens + used.completion_tokens,
        )

    async def _flush(self) -> None:
        """Write batches until nothing is left, at a limited rate, whatever the number of requests."""
        while self._sums or self._batch:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._flush_every_s):
                    await self._closing.wait()
            while not await self._write():
                await asyncio.sleep(RETRY_S)

    async def _write(self) -> bool:
        if self._batch is None:
            self._last_number = max(self._last_number + 1, int(1000 * self._clock()))
            self._batch, self._sums = (self._last_number, list(self._sums.values())), {}
        number, rows = self._batch
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._store.add_usage, rows, self._writer, number)
        except Exception as error:  # any error: keep the sums and log it
            self._failures.inc()
            known = isinstance(error, PedroError)
            log.warning("usage could not be written and is kept: %s", error if known else "", exc_info=not known)
            return False
        self._batch = None
        return True
