"""Every engine replica that there is, each by its long-lived stream. Knows nothing of HTTP, of names, or of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Any

from pedro.errors import UnavailableError
from pedro.gateway.backend import Delta, GenerateCall
from pedro.refs import ModelRef
from pedro.serving.links import Link
from pedro.serving.routing import choose
from pedro.serving.wire import Peer, ReplicaLost

PATIENCE_S = 120.0  # how long a call waits for a replica where there is none, as while one is replaced


class Fleet:
    """The replicas of one engine deployment. `reach(replica)` gives the peer of a replica by its id.

    `backbone` is the digest of the one that calls mean. All on one event loop; `become` says which replicas there are.
    """

    def __init__(self, reach: Callable[[str], Peer], backbone: str = "") -> None:
        self._reach = reach
        self._backbone = backbone
        self._links: dict[str, Link] = {}
        self._leaving: list[Link] = []  # their last calls still run
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a call would go out at once."""
        return any(link.ready for link in self._links.values())

    def become(self, replicas: Iterable[str]) -> None:
        """These are the replicas from now on: new ones get a stream, missing ones no new calls."""
        wanted = set(replicas)
        self._leaving = [link for link in self._leaving if not link.closed]
        for replica in [replica for replica in self._links if replica not in wanted]:
            link = self._links.pop(replica)
            link.drain()
            self._leaving.append(link)
        for replica in wanted - self._links.keys():
            self._links[replica] = Link(replica, self._reach(replica), self._changed.set, self._backbone)

    async def generate(
        self, call: GenerateCall, ref: ModelRef | None, resumed: tuple[int, ...] = ()
    ) -> AsyncGenerator[list[Delta], None]:
        """The deltas of one call, on the replica that suits it.

        Raises the call's PedroError, ReplicaLost where the replica was lost on the way, UnavailableError where there
        is none.
        """
        link = await self._choose(ref)
        async with aclosing(link.call(call, ref, resumed)) as batches:
            async for batch in batches:
                yield batch

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What any one replica answers."""
        link = await self._choose(None)
        try:
            return await link.peer.ask(method, *arguments)
        except ReplicaLost as error:
            raise UnavailableError("the engine that was asked was lost; try again", code="replica_lost") from error

    async def ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """What each replica answers. One that is lost meanwhile is left out; any other error is raised."""
        asked = [link.peer.ask(method, *arguments) for link in self._links.values()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ReplicaLost):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def close(self) -> None:
        """End all streams."""
        await asyncio.gather(*(link.close() for link in [*self._links.values(), *self._leaving]))

    async def _choose(self, ref: ModelRef | None) -> Link:
        """The link to ask for adapter version `ref`; waits for one where there is none."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not self.ready:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise UnavailableError("no engine replica answers; try again later", code="no_replica") from error
        return self._links[choose(ref, {name: link.load for name, link in self._links.items() if link.ready})]
