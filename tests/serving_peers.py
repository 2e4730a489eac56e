"""A replica in this process, reached as an ingress reaches one, and the ways in which that can break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pedro.serving.replica import Replica
from pedro.serving.wire import Posted, ReplicaLost, Slice


class LocalPeer:
    """Conforms to `pedro.serving.wire.Peer`. `lost` set: the replica is gone; `broken` breaks the stream once."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.lost = asyncio.Event()
        self.broken = asyncio.Event()
        self.streams = 0
        self.slices: list[Slice] = []
        self.posts: list[tuple[int, int]] = []  # calls and cancellations of each

    async def stream(self, link: str) -> AsyncGenerator[Slice, None]:
        self._check()
        self.streams += 1
        self.broken.clear()
        async with aclosing(self.replica.stream(link)) as slices:
            while True:
                following = asyncio.ensure_future(anext(slices))
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
                self.slices.append(following.result())
                yield following.result()

    async def post(self, link: str, calls: list[Posted], cancelled: list[int]) -> None:
        self._check()
        self.posts.append((len(calls), len(cancelled)))
        await self.replica.post(link, calls, cancelled)

    async def ask(self, method: str, *arguments: Any) -> Any:
        self._check()
        return await getattr(self.replica, method)(*arguments)

    def _check(self) -> None:
        if self.lost.is_set():
            raise ReplicaLost("killed by the test")
