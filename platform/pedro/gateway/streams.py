"""Runs backend streams for as long as the client is there. Knows nothing of OpenAI's shapes.

Each backend stream is read by a task of its own, which is cancelled once and then awaited: the backend's clean-up
may await, whatever happens to the request's own task meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from pedro.gateway.backend import Backend, Delta, GenerateCall

QUEUED_DELTAS = 256  # a client slower than this holds its own streams up, and nobody else's

Result = TypeVar("Result")


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
        """Returns once every call has given its first delta, or has ended."""
        waiting = set(range(len(self._calls)))
        while waiting:
            number, item = await self._queue.get()
            waiting.discard(number)
            self._take(number, item, self._early)

    async def batches(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """(number of the call, delta) in the order of arrival; what arrived together comes together."""
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
                        yield batch  # what came before the error is the client's
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


async def _end(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
