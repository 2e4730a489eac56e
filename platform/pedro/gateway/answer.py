"""Answers one generation request: admits it, then sends the whole answer or a stream of events, and settles its tokens.

Subclasses such as `ChoicesAnswer` (completions and chats) define the format. Everything happens inside the response, so
that one block owns the backend's streams from admission to the last byte. Each backend stream is read by a separate
task, which is cancelled once and then awaited, so that the backend can finish its clean-up even if the request's task
is cancelled.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from pedro.gateway.body_formats import BodyFormat, Choice, envelope, usage
from pedro.gateway.edge import note, request_id_of
from pedro.gateway.errors import stream_error_body
from pedro.gateway.quotas import Ticket, prompt_estimate
from pedro.gateway.schemas import StreamOptions
from pedro.gateway.usage import CallMeter

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from pedro.gateway.backend import Backend, Delta, GenerateCall
    from pedro.gateway.usage import UsageEntry

QUEUED_DELTAS = 256  # beyond this a slow client blocks only its own streams
BLOCK = 64  # bytes
NO_OPTIONS = StreamOptions()
DONE = b"data: [DONE]\n\n"
ENCODED = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # tells proxies not to buffer events
]
Result = TypeVar("Result")


class Answer(Response, ABC):
    """An ASGI response: the answer to `calls` as one body.

    However the response ends, `ticket` is settled with the tokens used and `entry` is recorded in the usage ledger.
    """

    def __init__(
        self,
        backend: Backend,
        calls: Sequence[GenerateCall],
        ticket: Ticket,
        entry: UsageEntry,
    ) -> None:
        super().__init__()
        self._backend, self._ticket, self._entry = backend, ticket, entry
        self._meters = [CallMeter() for _ in calls]
        self._calls = [replace(call, meter=meter) for call, meter in zip(calls, self._meters, strict=True)]
        self._choices = [
            [Choice(number * call.n + index) for index in range(call.n)] for number, call in enumerate(calls)
        ]
        self._fingerprint: str | None = None
        self._begun = time.monotonic()
        self._first_s: float | None = None  # until the first delta

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._entry.begin(self._meters, self._count)
        try:
            await self._respond(scope, receive, send)
        except (ClientDisconnect, asyncio.CancelledError):
            self._ticket.settle(self._used(unseen_prompts=True))
            raise
        finally:
            self._ticket.settle(self._used(unseen_prompts=False))
            self._entry.end()
            note(scope, **self._facts())

    @abstractmethod
    def _body(self) -> dict[str, Any]:
        """The whole answer, once every choice is finished."""

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await while_connected(receive, self._collect())
        await JSONResponse(body)(scope, receive, send)

    async def _collect(self) -> dict[str, Any]:
        async with FanIn(self._backend, self._calls) as deltas:
            async for batch in deltas.batches():
                for number, delta in batch:
                    self._accept(number, delta, keep=True)
        self._check_finished()
        return self._body()

    def _accept(self, number: int, delta: Delta, *, keep: bool) -> Choice:
        if self._first_s is None:
            self._first_s = time.monotonic() - self._begun
        choice = self._choices[number][delta.index]
        choice.accept(delta, keep=keep)
        self._fingerprint = delta.fingerprint or self._fingerprint
        return choice

    def _facts(self) -> dict[str, Any]:
        """This answer's fields in the access log."""
        counted = usage(self._choices)
        waits = [choice.queue_s for of_call in self._choices for choice in of_call if choice.queue_s is not None]
        return {
            "model": self._calls[0].model,
            "prompt_tokens": counted["prompt_tokens"],
            "completion_tokens": counted["completion_tokens"],
            "queue": max(waits, default=None),
            "first": self._first_s,
        }

    def _used(self, *, unseen_prompts: bool) -> int:
        """Tokens of prompts and answers so far; `unseen_prompts`: include estimates for prompts without a delta yet."""
        total = 0
        for call, choices in zip(self._calls, self._choices, strict=True):
            seen = max(choice.prompt_tokens for choice in choices)
            total += seen or (prompt_estimate(call) if unseen_prompts else 0)
            total += sum(choice.completion_tokens for choice in choices)
        return total

    def _count(self) -> None:
        """Update the meters with the tokens seen so far."""
        for meter, choices in zip(self._meters, self._choices, strict=True):
            prompt_tokens = max(choice.prompt_tokens for choice in choices)
            cached_tokens = max(choice.cached_tokens for choice in choices)
            meter.count(prompt_tokens, sum(choice.completion_tokens for choice in choices), cached_tokens)

    def _check_finished(self) -> None:
        """Raise if a stream ended early: a truncated answer must not look complete."""
        for of_call in self._choices:
            for choice in of_call:
                if choice.finish_reason is None:
                    raise RuntimeError(f"the backend's stream ended before choice {choice.index} was finished")


class StreamedAnswer(Answer):
    """With `stream` the answer is sent as events instead."""

    def __init__(
        self, backend: Backend, calls: Sequence[GenerateCall], ticket: Ticket, entry: UsageEntry, stream: bool
    ) -> None:
        super().__init__(backend, calls, ticket, entry)
        self._stream = stream

    @abstractmethod
    def _first_events(self) -> bytes:
        """The first events of a stream."""

    @abstractmethod
    def _events(self, number: int, delta: Delta) -> bytes:
        """The events of a delta of call `number`."""

    @abstractmethod
    def _last_events(self) -> bytes:
        """The last events of a stream whose choices have all finished."""

    @abstractmethod
    def _error_events(self, error: Exception, request_id: str) -> bytes:
        """The last events of a stream that failed."""

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._stream:
            await while_connected(receive, self._send_events(send, request_id_of(scope)))
        else:
            await super()._respond(scope, receive, send)

    async def _send_events(self, send: Send, request_id: str) -> None:
        """Nothing is sent, not even the status, until there is text to show: clients whose connection breaks before
        that retry by themselves."""
        started = False
        async with FanIn(self._backend, self._calls) as deltas:
            try:
                await deltas.admitted()
                first = self._first_events()
                async for batch in deltas.batches():
                    events = b"".join(self._events(number, delta) for number, delta in batch)
                    if events:
                        if not started:
                            started = await _start(send)
                        await send({"type": "http.response.body", "body": first + events, "more_body": True})
                        first = b""
                self._check_finished()
                last = first + self._last_events()
            except Exception as error:
                if not started:
                    raise  # it has its own status
                last = self._error_events(error, request_id)
        if not started:
            await _start(send)
        await send({"type": "http.response.body", "body": last, "more_body": False})


class ChoicesAnswer(StreamedAnswer):
    """The answer of completions and chats, in `body_format`; `options` add to the events of a stream."""

    def __init__(
        self,
        backend: Backend,
        calls: Sequence[GenerateCall],
        body_format: BodyFormat,
        ticket: Ticket,
        *,
        entry: UsageEntry,
        stream: bool = False,
        options: StreamOptions = NO_OPTIONS,
    ) -> None:
        super().__init__(backend, calls, ticket, entry, stream)
        self._format, self._options = body_format, options

    def _body(self) -> dict[str, Any]:
        choices = [self._format.choice(choice) for of_call in self._choices for choice in of_call]
        body = envelope(self._format, self._format.object, choices, self._fingerprint)
        return {**body, "usage": usage(self._choices)}

    def _first_events(self) -> bytes:
        return b""

    def _events(self, number: int, delta: Delta) -> bytes:
        choice = self._accept(number, delta, keep=False)
        return b"".join(self._chunk([entry]) for entry in self._format.chunks(choice, delta))

    def _last_events(self) -> bytes:
        counted = self._chunk([], usage=usage(self._choices)) if self._options.include_usage else b""
        return counted + DONE

    def _error_events(self, error: Exception, request_id: str) -> bytes:
        return sent_event(stream_error_body(error, request_id)) + DONE

    def _chunk(self, choices: list[dict[str, Any]], **extra: Any) -> bytes:
        if self._options.include_usage:
            so_far = usage(self._choices) if self._options.continuous_usage_stats else None
            extra = {"usage": so_far, **extra}
        body = {**envelope(self._format, self._format.chunk_object, choices, self._fingerprint), **extra}
        if self._options.include_obfuscation:  # pads to whole blocks, so that sizes do not reveal the text
            body["obfuscation"] = secrets.token_hex(BLOCK // 2)[: BLOCK - len(sent_event(body)) % BLOCK]
        return sent_event(body)


async def _start(send: Send) -> bool:
    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
    return True


def sent_event(body: dict[str, Any], name: str = "") -> bytes:
    """A server-sent event, as its bytes."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + ENCODED(body).encode() + b"\n\n"


class FanIn:
    """Reads the streams of several calls at once.

    Use as `async with FanIn(...) as deltas`: leaving the block ends every stream still running. `admitted()` first,
    then `batches()`; both raise what a stream raised.
    """

    def __init__(self, backend: Backend, calls: Sequence[GenerateCall]) -> None:
        self._backend = backend
        self._calls = calls
        self._queue: asyncio.Queue[tuple[int, Delta | BaseException | None]] = asyncio.Queue(QUEUED_DELTAS)
        self._early: list[tuple[int, Delta]] = []
        self._running = len(calls)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> FanIn:
        self._tasks = [asyncio.create_task(self._pump(i, call)) for i, call in enumerate(self._calls)]
        return self

    async def __aexit__(self, *_: object) -> None:
        await _end(*self._tasks)

    async def admitted(self) -> None:
        """Returns once every call has sent its first delta or ended."""
        waiting = set(range(len(self._calls)))
        while waiting:
            number, item = await self._queue.get()
            waiting.discard(number)
            self._take(number, item, self._early)

    async def batches(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """(number of the call, delta) in order of arrival; deltas that arrived together form one batch."""
        batch, self._early = self._early, []
        if batch:
            yield batch
        while self._running:
            batch = []
            self._take(*await self._queue.get(), batch)
            while not self._queue.empty():
                try:
                    self._take(*self._queue.get_nowait(), batch)
                except Exception:
                    if batch:
                        yield batch  # deltas before the error are still delivered
                    raise
            if batch:
                yield batch

    def _take(self, number: int, item: Delta | BaseException | None, batch: list[tuple[int, Delta]]) -> None:
        if item is None:
            self._running -= 1
        elif isinstance(item, BaseException):
            raise item
        else:
            batch.append((number, item))

    async def _pump(self, number: int, call: GenerateCall) -> None:
        try:
            async with aclosing(self._backend.generate(call)) as stream:
                async for delta in stream:
                    await self._queue.put((number, delta))
        except Exception as error:  # noqa: BLE001 (raised again by the reader)
            await self._queue.put((number, error))
        else:
            await self._queue.put((number, None))


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`; cancels it and raises ClientDisconnect if the client goes away first.

    The request's body must have been read: the next message can only be the disconnect.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await _end(task, watcher)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await to_its_end(asyncio.gather(*tasks, return_exceptions=True))


async def to_its_end(work: Awaitable[Result]) -> Result:
    """The result of a clean-up, which continues even if the caller is cancelled, who then leaves after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})  # cancelling `wait` does not cancel the task
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # retrieved, to silence asyncio's warning
        raise cancelled
    return task.result()
