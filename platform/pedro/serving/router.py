"""Chooses the replica for each call, and keeps a client for each replica.

Each adapter orders the replicas by rendezvous hashing, so that it is resident on few of them and adding or removing a
replica only moves that replica's share. No replica takes more than a bounded share of the load (Mirrokni, Thorup,
Zadimoghaddam 2016, "Consistent Hashing with Bounded Loads"): the excess goes to the next in order, so a hot adapter
spreads over as many replicas as its load needs. `jobs.benchmarks.fleet` simulates with the same functions.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pedro.errors import UnavailableError
from pedro.serving.client import ReplicaClient
from pedro.serving.protocol import ControlRequest, ReplicaConnection, ReplicaLost

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pedro.gateway.backend import Delta, GenerateCall
    from pedro.refs import ModelRef

SHARE = 1.25  # of the mean load
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # splitmix64's finaliser (Steele, Lea, Flood 2014)
PATIENCE_S = 120.0  # how long a call waits if there is no replica, for instance while one is replaced
RECHECK_S = 0.5  # how often to re-check `suits`, which may change by itself

T = TypeVar("T")


def choose(ref: ModelRef | None, loads: Mapping[str, int]) -> str:
    """The replica for adapter version `ref`, given the unfinished calls of each replica (at least one).

    The bare backbone (None) goes to the least loaded.
    """
    if ref is None:
        return min(loads, key=lambda replica: (loads[replica], random.random()))  # noqa: S311 (breaks ties)
    names = list(loads)
    seeds = np.fromiter(map(key_of, names), np.uint64, len(names))
    counts = np.fromiter(loads.values(), np.int64, len(names))
    return names[pick(ranks(key_of(str(ref)), seeds), counts)]


@lru_cache(maxsize=65536)
def key_of(name: str) -> int:
    """A 64-bit hash of an adapter version or a replica."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def ranks(key: int, replicas: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The weight of each replica [N], given by key [N], for the adapter of `key`."""
    mixed = replicas ^ np.uint64(key)
    for shift, factor in MIX:
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def pick(liked: NDArray[np.uint64], loads: NDArray[np.int64], share: float = SHARE) -> int:
    """The index in `loads` [N] of the replica with the highest weight among those below the bound."""
    bound = math.ceil(share * (int(loads.sum()) + 1) / len(loads))
    return int(np.where(loads < bound, liked, 0).argmax())


Placement = Callable[["ModelRef | None", Mapping[str, int]], str]


class ReplicaSet:
    """The replicas of one engine deployment. `connect(replica)` returns the connection to a replica by id.

    `backbone` is the digest of the backbone that calls expect; `place` chooses among replicas, default `choose`. For
    one event loop; `update` sets the replicas.
    """

    def __init__(
        self, connect: Callable[[str], ReplicaConnection], backbone: str = "", place: Placement | None = None
    ) -> None:
        self._connect = connect
        self._backbone = backbone
        self._place = place
        self._clients: dict[str, ReplicaClient] = {}
        self._leaving: list[ReplicaClient] = []  # their last calls are still running
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a call could be sent at once."""
        return any(client.ready for client in self._clients.values())

    def update(self, replicas: Iterable[str]) -> None:
        """Set the replicas: new ones get a stream, missing ones no new calls."""
        wanted = set(replicas)
        self._leaving = [client for client in self._leaving if not client.closed]
        for replica in [replica for replica in self._clients if replica not in wanted]:
            client = self._clients.pop(replica)
            client.drain()
            self._leaving.append(client)
        for replica in wanted - self._clients.keys():
            self._clients[replica] = ReplicaClient(replica, self._connect(replica), self._changed.set, self._backbone)

    @property
    def load(self) -> int:
        """Unfinished calls on the replicas, of all gateways, as far as this one knows."""
        return sum(client.load for client in self._clients.values())

    async def generate(
        self,
        call: GenerateCall,
        ref: ModelRef | None,
        resumed: tuple[int, ...] = (),
        suits: Callable[[ReplicaClient], bool] | None = None,
    ) -> AsyncGenerator[list[Delta], None]:
        """The deltas of one call, on the best replica; with `suits`, on one that satisfies it and is known to be alive.

        Raises the call's PedroError, ReplicaLost if the replica was lost meanwhile, UnavailableError if there is none.
        """
        client = await (self._choose(ref) if suits is None else self._choose_alive(ref, suits))
        async with aclosing(client.generate(call, ref, resumed)) as batches:
            async for batch in batches:
                yield batch

    async def ask(self, request: ControlRequest[T]) -> T:
        """The answer of any one replica."""
        client = await self._choose(None)
        try:
            return await client.connection.ask(request)
        except ReplicaLost as error:
            raise UnavailableError("the engine was lost; try again", code="replica_lost") from error

    async def ask_all(self, request: ControlRequest[T]) -> list[T]:
        """The answers of all replicas. Lost ones are omitted; any other error is raised."""
        asked = [client.connection.ask(request) for client in self._clients.values()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ReplicaLost):
                raise answer
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def close(self) -> None:
        """End all streams."""
        await asyncio.gather(*(client.close() for client in [*self._clients.values(), *self._leaving]))

    async def _choose(
        self, ref: ModelRef | None, suits: Callable[[ReplicaClient], bool] = lambda _: True
    ) -> ReplicaClient:
        """The client for adapter version `ref`, among those that suit; waits if there is none."""

        def loads() -> dict[str, int]:
            return {name: client.load for name, client in self._clients.items() if client.ready and suits(client)}

        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (found := loads()):
                    self._changed.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(RECHECK_S):
                            await self._changed.wait()
        except TimeoutError as error:
            raise UnavailableError("no engine replica answers; try again later", code="no_replica") from error
        return self._clients[(self._place or choose)(ref, found)]

    async def _choose_alive(self, ref: ModelRef | None, suits: Callable[[ReplicaClient], bool]) -> ReplicaClient:
        while True:
            client = await self._choose(ref, suits)
            with suppress(ReplicaLost):
                await client.answer()
                return client
