"""The usage ledger as one gateway keeps it: what each call used, summed, and handed to the store in batches.

No request waits for the database. A batch that could not be written is kept and written again; meanwhile sums grow in
number only as far as `MAX_SUMS`: beyond it they are a tenant's as a whole. What a gateway has not handed over when it
is killed is lost: a second's worth, or all since the database went away. Knows neither texts nor engines.
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
LAST_FLUSH_S = 10.0  # how long a gateway that ends waits for the database
MAX_SUMS = 20_000
SEVERAL = "(several)"  # the model of sums that were too many to be kept apart
MAX_MODEL = 200  # characters, as the ledger has them
log = logging.getLogger("pedro.gateway")
Key = tuple[str, str, str, str]


class CallMeter:
    """What one call has used by now: totals, which only grow.

    Whoever reads a call to its end knows them from its deltas. One that is left before its end, or ends in an error,
    may have used more than was seen: then the backend `expect`s a count, and has it `settled` some seconds later at
    most, with or without one. All on one event loop.
    """

    def __init__(self) -> None:
        self.model = ""  # tenant.adapter, or the backbone's name; empty until it is known
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self._expected = 0
        self._then: Callable[[], None] = lambda: None

    @property
    def is_settled(self) -> bool:
        """Whether no count is to come."""
        return not self._expected

    def count(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> None:
        """So much was used at least."""
        self.prompt_tokens = max(self.prompt_tokens, prompt_tokens)
        self.cached_tokens = max(self.cached_tokens, cached_tokens)
        self.completion_tokens = max(self.completion_tokens, completion_tokens)

    def expect(self) -> None:
        """A count is to come, though the call was left."""
        self._expected += 1

    def settled(self) -> None:
        """That count came, or will not."""
        self._expected -= 1
        if not self._expected:
            self._then()

    def when_settled(self, then: Callable[[], None]) -> None:
        """Have `then` called once no count is to come any more."""
        self._then = then


class UsageEntry:
    """What one request uses: `begin`, and `end` once it is answered, however that ends."""

    def __init__(self, ledger: UsageLedger, tenant: str, key_id: str, model: str) -> None:
        self._ledger = ledger
        self.tenant, self.key_id, self._model = tenant, key_id, model
        self._meters: Sequence[CallMeter] = ()
        self._refresh: Callable[[], None] = lambda: None

    def begin(self, meters: Sequence[CallMeter], refresh: Callable[[], None]) -> None:
        """`meters` are those of its calls, which `refresh` brings up to date with what was seen of them."""
        self._meters, self._refresh = meters, refresh
        self._ledger.opened(self)

    def end(self) -> None:
        """Enter it, at once or when the last count that is still to come is there."""
        self._refresh()
        for meter in self._meters:
            meter.when_settled(self._enter)
        self._enter()

    def give_up(self) -> None:
        """Enter what is known by now."""
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
    """For one event loop; the database is asked on threads. `clock` gives Unix seconds, of which the day is UTC's."""

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
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-usage")  # readers do not hold it up
        self._open: set[UsageEntry] = set()
        self._sums: dict[Key, Usage] = {}
        self._batch: tuple[int, list[Usage]] | None = None  # on its way to the store, or to be sent again
        self._last_number = 0
        self._flushing: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        unwritten = Gauge(
            "pedro_gateway_usage_unwritten_requests",
            "Requests whose usage the database does not have yet.",
            registry=registry,
        )
        unwritten.set_function(lambda: self.unwritten)
        self._failures = Counter(
            "pedro_gateway_usage_write_failures", "Batches of usage that could not be written.", registry=registry
        )

    @property
    def unwritten(self) -> int:
        """Requests that were answered and are not in the database."""
        batch = self._batch[1] if self._batch else []
        return sum(used.requests for used in [*self._sums.values(), *batch])

    def entry(self, tenant: str, key_id: str, model: str) -> UsageEntry:
        """For a request of that key; `model` is what it names, until it is known what that means."""
        return UsageEntry(self, tenant, key_id, model)

    def opened(self, entry: UsageEntry) -> None:
        """A request that will be entered when it has ended."""
        self._open.add(entry)

    def add(self, entry: UsageEntry) -> None:
        """Enter a request, once. One that used nothing, as a refused one, is none."""
        if entry not in self._open:
            return
        self._open.discard(entry)
        used = entry.used(time.strftime("%Y-%m-%d", time.gmtime(self._clock())))
        if used.prompt_tokens or used.completion_tokens:
            self._add(used)
            if self._flushing is None or self._flushing.done():
                self._flushing = asyncio.create_task(self._flush(), context=Context())  # about no request

    async def close(self) -> None:
        """Write what is known, also of requests that have not ended; waits for the database, but not for ever."""
        for entry in list(self._open):
            entry.give_up()
        self._closing.set()
        if self._flushing is not None:
            await asyncio.wait({self._flushing}, timeout=LAST_FLUSH_S)
        if self.unwritten:
            log.error("the usage of %d requests could not be written, and is lost", self.unwritten)
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
        """Write batches until nothing is left; at most one in a while, whatever the number of requests."""
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
        except Exception as error:  # whatever it is: the sums are kept, and told of
            self._failures.inc()
            known = isinstance(error, PedroError)
            log.warning("usage was not written and is kept: %s", error if known else "", exc_info=not known)
            return False
        self._batch = None
        return True
