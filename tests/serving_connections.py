"""A replica in this process, reached as an ingress reaches one, and the ways in which that can break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from pedro.serving.protocol import ControlRequest, OutputBatch, ReplicaLost, SubmitRequest, T

if TYPE_CHECKING:
    from pedro.serving.server import ReplicaServer


class LocalConnection:
    """Conforms to `pedro.serving.protocol.ReplicaConnection`.

    `lost` set: the replica is gone, by itself after `lost_after` more batches that hold anything; `broken` breaks the
    stream once.
    """

    def __init__(self, replica: ReplicaServer) -> None:
        self.replica = replica
        self.lost = asyncio.Event()
        self.broken = asyncio.Event()
        self.lost_after: int | None = None
        self.streams = 0
        self.batches: list[OutputBatch] = []
        self.submits: list[tuple[int, int]] = []  # requests and cancellations of each

    async def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        self._check()
        self.streams += 1
        self.broken.clear()
        async with aclosing(self.replica.stream(stream_id)) as batches:
            while True:
                following = asyncio.ensure_future(anext(batches))
                breaks = [asyncio.ensure_future(event.wait()) for event in (self.lost, self.broken)]
                try:
                    await asyncio.wait([following, *breaks], return_when=asyncio.FIRST_COMPLETED)
                    if any(event.done() for event in breaks):
                        raise ReplicaLost("broken by the test")
                finally:
                    for task in (following, *breaks):
                        if not task.done():
                            task.cancel()
                    await asyncio.gather(following, *breaks, return_exceptions=True)
                batch = following.result()
                self.batches.append(batch)
                if self.lost_after is not None and batch.parts:
                    self.lost_after -= 1
                    if not self.lost_after:
                        self.lost.set()
                yield batch

    async def submit(self, stream_id: str, requests: list[SubmitRequest], cancelled: list[int]) -> None:
        self._check()
        self.submits.append((len(requests), len(cancelled)))
        await self.replica.submit(stream_id, requests, cancelled)

    async def ask(self, request: ControlRequest[T]) -> T:
        self._check()
        return await self.replica.ask(request)

    def _check(self) -> None:
        if self.lost.is_set():
            raise ReplicaLost("killed by the test")


class Faulty(LocalConnection):
    """Once, at the third batch that holds anything: "loses" or "doubles" it, or "swaps" it with the next one.

    `what` is so treated, "batch" or only the "parts" in it.
    """

    fault, what = "", ""

    def __init__(self, replica: ReplicaServer) -> None:
        super().__init__(replica)
        self.seen = 0
        self.held: OutputBatch | None = None

    async def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        async with aclosing(super().stream(stream_id)) as batches:
            async for batch in batches:
                for changed in self._changed(batch):
                    yield changed

    def _changed(self, batch: OutputBatch) -> list[OutputBatch]:
        self.seen += bool(batch.parts)
        whole = self.what == "batch"
        if self.held is not None and batch.parts:
            first, self.held = self.held, None
            return [batch, first] if whole else [replace(batch, parts=batch.parts + first.parts)]
        if self.seen != 3 or not batch.parts:
            return [batch]
        if self.fault == "doubles":
            return [batch, batch] if whole else [replace(batch, parts=batch.parts * 2)]
        if self.fault == "swaps":
            self.held = batch
        return [] if whole else [replace(batch, parts=())]
