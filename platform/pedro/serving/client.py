"""One ingress's client of one replica: submits calls over its connection and distributes the outputs."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pedro import tracing
from pedro.errors import PedroError
from pedro.serving.protocol import (
    SILENCE_S,
    OutputBatch,
    OutputPart,
    ReplicaConnection,
    ReplicaLost,
    Spent,
    SubmitRequest,
    TokenCounts,
)

if TYPE_CHECKING:
    from pedro.gateway.backend import Delta, GenerateCall
    from pedro.refs import ModelRef

MAX_UNREAD = 1024  # batches: at least half a minute of output
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 2.0
COUNT_S = 10.0  # for a replica to report an abandoned call's usage, in the background
log = logging.getLogger("pedro.serving")


class ReplicaClient:
    """Keeps the stream open until `close`; not `ready` between a break and the next stream.

    `on_change` is called whenever `ready` or `waiting` changes. All on one event loop.
    """

    def __init__(
        self, replica: str, connection: ReplicaConnection, on_change: Callable[[], None], backbone: str = ""
    ) -> None:
        self.replica = replica
        self.connection = connection
        self.ready = False
        self._on_change = on_change
        self._backbone = backbone
        self._id = ""
        self._others = 0  # calls of other ingresses, as of the last batch
        self._due = 0  # the number of the next batch
        self._blameless = False  # whether the stream broke for a reason that no call can cause
        self._numbers = iter(range(1, 2**62))
        self._inboxes: dict[int, _Inbox] = {}
        self._left: dict[int, _Inbox] = {}  # abandoned calls whose usage is pending
        self._to_submit: list[SubmitRequest] = []
        self._to_cancel: list[int] = []
        self._to_answer: list[asyncio.Future[None]] = []
        self._something_to_send = asyncio.Event()
        self._draining = False
        self._retry_s = FIRST_RETRY_S
        self._task = asyncio.create_task(self._run())

    @property
    def load(self) -> int:
        """Unfinished calls on the replica, of this ingress and of others."""
        return self._others + len(self._inboxes)

    def waiting(self, within_s: float) -> set[ModelRef]:
        """Adapter versions of calls without output yet, unless they were sent too long ago."""
        since = time.monotonic() - within_s
        empty = [inbox for inbox in self._inboxes.values() if not inbox.begun and not inbox.ended]
        return {inbox.ref for inbox in empty if inbox.ref is not None and inbox.since >= since}

    async def answer(self) -> None:
        """Returns once the replica has answered a message sent after this call. Raises ReplicaLost."""
        if not self.ready:
            raise ReplicaLost(self.replica, blameless=True)
        answered = asyncio.get_running_loop().create_future()
        self._to_answer.append(answered)
        self._something_to_send.set()
        await answered

    async def generate(
        self, call: GenerateCall, ref: ModelRef | None, resumed: tuple[int, ...]
    ) -> AsyncGenerator[list[Delta], None]:
        """The deltas of one call, as they arrive. Leaving early ends the call on the replica.

        Raises the call's own PedroError, or ReplicaLost if the stream broke before the call was finished, or part of
        the answer is missing, duplicated or out of order.
        """
        if not self.ready:
            raise ReplicaLost(self.replica, blameless=True)
        number = next(self._numbers)
        inbox = self._inboxes[number] = _Inbox(call, ref, len(resumed))
        bare = replace(call, meter=None)
        trace = "" if tracing.TRACER is None else tracing.TRACEPARENT.get()
        self._to_submit.append(SubmitRequest(number, bare, ref, resumed, self._backbone, trace))
        self._something_to_send.set()
        try:
            while not inbox.finished:
                yield await inbox.get()
        finally:
            self._leave(number)

    def drain(self) -> None:
        """Accept no more calls; the stream ends after those in progress."""
        self._draining = True
        self._set_ready(False)
        self._end_if_drained()

    async def close(self) -> None:
        """End the stream and every call on it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def closed(self) -> bool:
        return self._task.done()

    def _leave(self, number: int) -> None:
        inbox = self._inboxes.pop(number, None)
        if inbox is not None:
            if (inbox.ended or self._cancel(number)) and not inbox.is_counted:
                self._await_count(number, inbox)
            inbox.tell()
        self._on_change()
        self._end_if_drained()

    def _cancel(self, number: int) -> bool:
        """End a call on the replica; False if it was never sent."""
        waiting = [request for request in self._to_submit if request.number != number]
        if len(waiting) < len(self._to_submit):
            self._to_submit = waiting
            return False
        self._to_cancel.append(number)
        self._something_to_send.set()
        return True

    def _await_count(self, number: int, inbox: _Inbox) -> None:
        """Pass the replica's count of an abandoned call to its meter, within a time limit."""
        if inbox.meter is not None:
            self._left[number] = inbox
            inbox.meter.expect()
            asyncio.get_running_loop().call_later(COUNT_S, self._counted, number)

    def _counted(self, number: int) -> None:
        inbox = self._left.pop(number, None)
        if inbox is not None and inbox.meter is not None:
            inbox.tell()
            inbox.meter.settled()
            self._end_if_drained()

    async def _run(self) -> None:
        """Stream until closed, reconnecting after each break. Calls unfinished at a break fail with ReplicaLost."""
        try:
            while not self._draining:
                self._id = f"{self.replica}-{secrets.token_hex(6)}"
                try:
                    await self._stream()
                except* ReplicaLost as lost:
                    log.warning("the stream with replica %s broke: %s", self.replica, lost.exceptions[0])
                except* Exception:
                    log.exception("the stream with replica %s failed", self.replica)
                await asyncio.sleep(self._retry_s)
                self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
        finally:
            self._lose()

    async def _stream(self) -> None:
        """One stream, from its first item until it breaks."""
        stream = self.connection.stream(self._id)
        self._due, self._blameless = 0, False
        try:
            await self._next(stream)
            self._retry_s = FIRST_RETRY_S
            self._set_ready(not self._draining)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._read(stream))
                both.create_task(self._submit())
        finally:
            self._lose()
            with suppress(Exception):  # a broken stream may fail to close
                await stream.aclose()

    async def _read(self, stream: AsyncGenerator[OutputBatch, None]) -> None:
        while True:
            self._hand_out(await self._next(stream))

    async def _next(self, stream: AsyncGenerator[OutputBatch, None]) -> OutputBatch:
        try:
            async with asyncio.timeout(SILENCE_S):
                batch = await anext(stream)
        except StopAsyncIteration:
            raise ReplicaLost("it ended") from None
        except TimeoutError as error:
            raise ReplicaLost(f"nothing came for {SILENCE_S:g} s") from error
        if batch.number != self._due:
            self._blameless = True
            raise ReplicaLost(f"batch {batch.number} came where {self._due} was due")
        self._due += 1
        return batch

    async def _submit(self) -> None:
        """Send pending calls, one message at a time, so that concurrent calls are batched."""
        while True:
            await self._something_to_send.wait()
            self._something_to_send.clear()
            requests, self._to_submit = self._to_submit, []
            cancelled, self._to_cancel = self._to_cancel, []
            asked = len(self._to_answer)
            if requests or cancelled or asked:
                try:
                    await self.connection.submit(self._id, requests, cancelled)
                except ReplicaLost as lost:
                    if lost.blameless:  # none was started
                        self._to_submit = [*requests, *self._to_submit]
                    raise
            for answered in self._to_answer[:asked]:
                if not answered.done():
                    answered.set_result(None)
            del self._to_answer[:asked]

    def _hand_out(self, batch: OutputBatch) -> None:
        self._others = max(0, batch.load - batch.mine)
        for number, part in batch.parts:
            inbox = self._inboxes.get(number)
            if inbox is None:
                self._count(number, part)
                continue
            first = not inbox.begun
            if not inbox.put(part):
                self._cancel(number)
            if first:
                self._on_change()

    def _count(self, number: int, part: OutputPart) -> None:
        """Handle output of an abandoned call."""
        inbox = self._left.get(number)
        if inbox is not None:
            with suppress(ReplicaLost):
                inbox.count(part)
            if inbox.is_counted:
                self._counted(number)

    def _lose(self) -> None:
        """The stream is gone, and its unfinished calls with it.

        No call is to blame where the replica was to leave anyway, nor one that it never heard of.
        """
        self._set_ready(False)
        blameless = self._blameless or self._draining
        unsent = {request.number for request in self._to_submit}
        self._to_submit, self._to_cancel = [], []
        for number, inbox in self._inboxes.items():
            inbox.fail(ReplicaLost(self.replica, blameless or number in unsent))
        for number in list(self._left):
            self._counted(number)
        for answered in self._to_answer:
            if not answered.done():
                answered.set_exception(ReplicaLost(self.replica, blameless=True))
        self._to_answer.clear()
        self._others = 0

    def _set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            self._on_change()

    def _end_if_drained(self) -> None:
        if self._draining and not self._inboxes and not self._left:
            self._task.cancel()


class _Inbox:
    """Unread output of one call: bounded, and never blocking other calls."""

    def __init__(self, call: GenerateCall, ref: ModelRef | None, resumed: int) -> None:
        self.ref = ref
        self.meter = call.meter
        self.since = time.monotonic()
        self.begun = False  # whether any output arrived
        self._echo = call.echo
        self._resumed = resumed  # answer tokens that the client already has
        self._counts = TokenCounts()
        self._prompt_tokens = self._cached_tokens = 0
        self._spent: Spent | None = None
        self._unfinished = call.n
        self._unread: list[list[Delta]] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the replica is done with the call."""
        return self._unfinished <= 0 or self._error is not None

    @property
    def is_counted(self) -> bool:
        """Whether the call's usage here is known, or does not count because the call is reissued."""
        return self._spent is not None or self._unfinished <= 0 or isinstance(self._error, ReplicaLost)

    @property
    def finished(self) -> bool:
        """Whether all was read."""
        return not self._unread and self._error is None and self._unfinished <= 0

    def put(self, part: OutputPart) -> bool:
        """Add output; False if the call must be ended, because it is not read or output was lost."""
        self.begun = True
        ended = self.ended
        try:
            self.count(part)
        except ReplicaLost as error:
            if ended:
                return True
            log.error("part of an answer was lost in transit: %s", error)
            self.fail(error)
            return False
        if ended or isinstance(part, Spent):
            return True
        if isinstance(part, Exception):
            self.fail(part)
            return True
        if len(self._unread) >= MAX_UNREAD:
            self._error = PedroError("the answer was not read for too long and was ended", code="client_too_slow")
            self._news.set()
            return False
        self._unread.append(part)
        self._news.set()
        return True

    def count(self, part: OutputPart) -> None:
        """Update the token counts. Raises ReplicaLost if output is missing or duplicated."""
        if isinstance(part, Spent):
            self._spent = part
        elif isinstance(part, list):
            for delta in part:
                before = self._resumed - (delta.prompt_tokens if self._echo else 0)  # a choice's first delta echoes
                self._counts.add(delta.index, len(delta.token_ids), delta.completion_tokens, before)
                self._prompt_tokens, self._cached_tokens = delta.prompt_tokens, delta.cached_tokens
            self._unfinished -= sum(delta.finish_reason is not None for delta in part)

    def tell(self) -> None:
        """Update the call's meter."""
        if self.meter is not None:
            self.meter.count(self._prompt_tokens, self._counts.total, self._cached_tokens)
            if (spent := self._spent) is not None:
                self.meter.count(spent.prompt_tokens, spent.completion_tokens, spent.cached_tokens)

    def fail(self, error: Exception) -> None:
        """End with `error`, after earlier output was read."""
        if not self.ended:
            self._error = error
            self._news.set()

    async def get(self) -> list[Delta]:
        """All unread output, in order; then raises the error, if any."""
        await self._news.wait()
        if self._unread:
            unread, self._unread = self._unread, []
            if self._error is None:
                self._news.clear()
            return [delta for part in unread for delta in part]
        assert self._error is not None, "woken for nothing"
        raise self._error
