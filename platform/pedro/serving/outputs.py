"""Sends a replica's outputs to one ingress: as the gateway's deltas, those of all its calls over one stream.

The engine's thread delivers outputs once per step and wakes the event loop only for what must be sent at once: a call's
first and last tokens. Everything else waits for the end of the time slice.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pedro.engine.sampler import Logprob
from pedro.errors import PedroError, UnavailableError
from pedro.gateway.backend import Alternative, Delta, GenerateCall, TokenLogprob
from pedro.serving.protocol import (
    HEARTBEAT_S,
    SLICE_S,
    OutputBatch,
    OutputPart,
    ReplicaLost,
    Spent,
    TokenCounts,
    slice_s,
)

if TYPE_CHECKING:
    from pedro.engine.request import Request
    from pedro.engine.sequence import Output
    from pedro.model_protocols import Tokenizer
    from pedro.serving.tokens import TokenTexts

TURNS = 4  # every group costs one item of the stream
ENGINE_FAILED = "the engine failed on this request; try again"
log = logging.getLogger("pedro.serving")


@dataclass
class _Open:
    """An unfinished call: how its outputs become deltas, and those waiting for the end of the slice."""

    number: int
    deltas: DeltaBuilder
    unfinished: int  # choices
    opened: bool = False
    pending: list[Output] = field(default_factory=list)
    failed: PedroError | ReplicaLost | None = None
    spent: Spent = field(default_factory=Spent)  # by finished choices

    def end_choice(self, output: Output) -> None:
        """Add the last output of a choice."""
        self.unfinished -= 1
        self.spent = Spent(
            max(self.spent.prompt_tokens, output.prompt_tokens),
            self.spent.completion_tokens + output.completion_tokens,
            max(self.spent.cached_tokens, output.cached_tokens),
        )


class OutputStream:
    """Belongs to the event loop that created it; only `take` is called from the engine's thread.

    `count` returns the number of unfinished calls of all streams; `end` ends a request of the engine by its id.
    """

    def __init__(self, count: Callable[[], int], end: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._count = count
        self._end = end
        self._calls: dict[str, _Open] = {}  # by the engine's request id
        self._ids: dict[int, str] = {}
        self._ending: dict[str, _Open] = {}  # by request id: ended calls whose usage is pending
        self._admitting: dict[int, asyncio.Task[None]] = {}
        self._refused: list[tuple[int, OutputPart]] = []
        self._numbers = itertools.count()  # of the batches
        self._arrived: deque[Output] = deque()
        self._urgent: set[str] = set()  # ids whose next output must be sent at once
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._calls) + len(self._admitting)

    def admit(self, number: int, work: asyncio.Task[None]) -> None:
        """`work` admits call `number` and ends in `open` or `refuse`."""
        self._admitting[number] = work
        work.add_done_callback(lambda _: self._admitting.pop(number, None))

    def open(self, number: int, request_id: str, choices: int, deltas: DeltaBuilder) -> None:
        """Call `number` is being passed to the engine and counts as admitted."""
        self._admitting.pop(number, None)
        self._calls[request_id] = _Open(number, deltas, choices)
        self._ids[number] = request_id
        self._urgent.add(request_id)

    def refuse(self, number: int, error: PedroError) -> None:
        """Call `number` ends before reaching the engine."""
        self._forget(number)
        self._refused += [(number, error), (number, Spent())]
        self._wake.set()

    def cancel(self, number: int) -> None:
        """End call `number` in any state; only its usage is still sent."""
        admitting, request_id = self._admitting.get(number), self._ids.get(number)
        if admitting is not None:
            admitting.cancel()
            self._refused.append((number, Spent()))
            self._wake.set()
        elif request_id is not None:
            self._ending[request_id] = self._calls[request_id]
            self._forget(number)
            self._end(request_id)

    def close(self) -> None:
        """End every call: the reader is gone."""
        for number in [*self._admitting, *self._ids]:
            self.cancel(number)

    def take(self, outputs: list[Output]) -> None:
        """Called on the engine's thread, once per step, with outputs of this stream's calls."""
        self._arrived.extend(outputs)
        if any(output.finish_reason is not None or output.request_id in self._urgent for output in outputs):
            with suppress(RuntimeError):  # the loop is closed: no reader is left
                self._loop.call_soon_threadsafe(self._wake.set)

    async def batches(self) -> AsyncGenerator[OutputBatch, None]:
        """The batches to send. The first is empty and means that calls may be submitted."""
        yield self._batch([])
        sent = ticked = self._loop.time()
        while True:
            due = ticked + (slice_s(len(self)) / self._turns if self._calls else HEARTBEAT_S)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            self._wake.clear()
            now = self._loop.time()
            tick = now >= due
            if tick:
                ticked = now
            parts = self._collect(tick)
            if parts or now >= sent + HEARTBEAT_S:
                sent = now
                yield self._batch(parts)

    def _collect(self, tick: bool) -> list[tuple[int, OutputPart]]:
        """What to send now: first and last outputs at once, others at the end of the call's time slice.

        With many calls the slices end in turns, so that a first token never queues behind all of them.
        """
        parts, self._refused = self._refused, []
        due: dict[str, _Open] = {}
        while self._arrived:
            output = self._arrived.popleft()
            held = self._calls.get(output.request_id)
            if held is None:  # cancelled
                parts += self._spent(output.request_id, output)
                continue
            held.pending.append(output)
            if output.finish_reason is not None:
                held.end_choice(output)
                held.failed = held.failed or _error_of(output)
            if output.finish_reason is not None or not held.opened:
                due[output.request_id] = held
        if tick:
            for request_id in list(self._calls)[: -(-len(self._calls) // self._turns)]:
                held = self._calls[request_id] = self._calls.pop(request_id)  # at the end of the next turns
                if held.pending:
                    due[request_id] = held
        for request_id, held in due.items():
            self._urgent.discard(request_id)
            held.opened = True
            outputs, held.pending = held.pending, []
            made = [output for output in outputs if _error_of(output) is None]
            if made:
                try:
                    parts.append((held.number, held.deltas(made)))
                except ReplicaLost as error:
                    log.error("outputs of request %s were lost in transit: %s", request_id, error)
                    held.failed = held.failed or error
                except Exception:  # any error ends this call, not the whole stream
                    log.exception("the outputs of request %s could not be written", request_id)
                    held.failed = held.failed or UnavailableError(ENGINE_FAILED, code="engine_error")
            if held.failed is not None:
                parts.append((held.number, held.failed))
                self.cancel(held.number)
                parts += self._spent(request_id)
            elif not held.unfinished:
                self._forget(held.number)
        return parts

    def _spent(self, request_id: str, output: Output | None = None) -> list[tuple[int, OutputPart]]:
        """The last part of an ended call, once all its choices have finished; `output` is one of these."""
        held = self._ending.get(request_id)
        if held is None:
            return []
        if output is not None and output.finish_reason is not None:
            held.end_choice(output)
        if held.unfinished:
            return []
        del self._ending[request_id]
        return [(held.number, held.spent)]

    @property
    def _turns(self) -> int:
        """The number of groups in which slices end."""
        return max(1, min(TURNS, int(slice_s(len(self)) / SLICE_S)))

    def _batch(self, parts: list[tuple[int, OutputPart]]) -> OutputBatch:
        return OutputBatch(next(self._numbers), self._count(), len(self), tuple(parts))

    def _forget(self, number: int) -> str | None:
        request_id = self._ids.pop(number, None)
        if request_id is not None:
            self._calls.pop(request_id, None)
            self._urgent.discard(request_id)
        return request_id


def _error_of(output: Output) -> PedroError | None:
    """The error of an answer. Calls ended early are removed first, so one cancelled here is the engine's fault."""
    failed = output.finish_reason == "cancelled"
    return UnavailableError(ENGINE_FAILED, code="engine_error") if failed else output.error


class DeltaBuilder:
    """Builds the deltas of one call. With echo, each choice's first delta begins with the prompt.

    Raises ReplicaLost if an output is missing, duplicated or out of order.
    """

    def __init__(
        self, tokenizer: Tokenizer, texts: TokenTexts, request: Request, call: GenerateCall, fingerprint: str
    ) -> None:
        self._texts = texts
        self._request = request
        self._fingerprint = fingerprint
        self._counts = TokenCounts()
        self._logprobs = call.params.get("logprobs") is not None
        self._unopened = set(range(request.n)) if call.echo else set()
        self._text = call.prompt if isinstance(call.prompt, str) else None
        if call.echo and self._text is None:
            self._text = tokenizer.decode(request.prompt_ids, skip_special_tokens=True)

    def __call__(self, outputs: Iterable[Output]) -> list[Delta]:
        """One delta per choice with all its outputs, in the order of their first ones."""
        choices: dict[int, list[Output]] = {}
        for output in outputs:
            before = len(self._request.resumed_ids)
            self._counts.add(output.index, len(output.token_ids), output.completion_tokens, before)
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
            cached_tokens=last.cached_tokens,
            fingerprint=self._fingerprint,
            queue_s=last.timing.queue_s if last.timing else None,
            embedding=last.embedding,
        )
        if index in self._unopened:
            self._unopened.discard(index)
            return self._echoed(delta, outputs[0])
        return delta

    def _echoed(self, delta: Delta, first: Output) -> Delta:
        """The delta preceded by the prompt's text, ids and logprobs."""
        ids = self._request.prompt_ids
        logprobs = delta.logprobs
        if self._logprobs and first.prompt_logprobs is not None:
            pairs = zip(ids, first.prompt_logprobs, strict=True)
            scored = [self._logprob(entry or Logprob(token, math.nan)) for token, entry in pairs]
            logprobs = (*scored, *(logprobs or ()))
        return replace(
            delta, text=(self._text or "") + delta.text, token_ids=(*ids, *delta.token_ids), logprobs=logprobs
        )

    def _logprob(self, entry: Logprob) -> TokenLogprob:
        text, raw = self._texts(entry.token_id)
        top = []
        for token_id, logprob in entry.top:
            other, other_raw = self._texts(token_id)
            top.append(Alternative(other, logprob, other_raw))
        return TokenLogprob(text, None if math.isnan(entry.logprob) else entry.logprob, tuple(top), raw)
