"""Which replica answers: a client of each one, and the choice among them for a call.

Each adapter has its own order of the replicas (rendezvous hashing), so that it is resident on few of them and a
replica that comes or goes moves only its own share. No replica takes more than a bounded share of the load
(Mirrokni, Thorup, Zadimoghaddam 2016, "Consistent Hashing with Bounded Loads"): what exceeds it goes to the next in
order, so a hot adapter spreads over as many replicas as its load asks for. `jobs.benchmarks.fleet` simulates with the
same functions.
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
PATIENCE_S = 120.0  # how long a call waits for a replica where there is none, as while one is replaced
RECHECK_S = 0.5  # whether one suits may change with time alone

T = TypeVar("T")


def choose(ref: ModelRef | None, loads: Mapping[str, int]) -> str:
    """The replica for adapter version `ref`, given the unfinished calls of each replica (at least one).

    The bare backbone (None) is at home everywhere: it goes to the least loaded.
    """
    if ref is None:
        return min(loads, key=lambda replica: (loads[replica], random.random()))  # noqa: S311 (breaks ties)
    names = list(loads)
    seeds = np.fromiter(map(key_of, names), np.uint64, len(names))
    counts = np.fromiter(loads.values(), np.int64, len(names))
    return names[pick(ranks(key_of(str(ref)), seeds), counts)]


@lru_cache(maxsize=65536)
def key_of(name: str) -> int:
    """64 bits that stand for an adapter version or a replica."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")


def ranks(key: int, replicas: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How much the adapter of `key` likes each replica [N], the replicas being given by their keys [N]."""
    mixed = replicas ^ np.uint64(key)
    for shift, factor in MIX:
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def pick(liked: NDArray[np.uint64], loads: NDArray[np.int64], share: float = SHARE) -> int:
    """The replica that is liked best of those below the bound, by its place in `loads` [N]."""
    bound = math.ceil(share * (int(loads.sum()) + 1) / len(loads))
    return int(np.where(loads < bound, liked, 0).argmax())


Placement = Callable[["ModelRef | None", Mapping[str, int]], str]


class ReplicaSet:
    """The replicas of one engine deployment. `connect(replica)` gives the connection to a replica by its id.

    `backbone` is the digest of the one that calls mean; `place` chooses among replicas, `choose` where it is not given.
    All on one event loop; `update` says which replicas there are.
    """

    def __init__(
        self, connect: Callable[[str], ReplicaConnection], backbone: str = "", place: Placement | None = None
    ) -> None:
        self._connect = connect
        self._backbone = backbone
        self._place = place
        self._clients: dict[str, ReplicaClient] = {}
        self._leaving: list[ReplicaClient] = []  # their last calls still run
        self._changed = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether a call would go out at once."""
        return any(client.ready for client in self._clients.values())

    def update(self, replicas: Iterable[str]) -> None:
        """These are the replicas from now on: new ones get a stream, missing ones no new calls."""
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
        """Calls that the replicas work on, as far as this gateway knows, those of others with its own."""
        return sum(client.load for client in self._clients.values())

    async def generate(
        self,
        call: GenerateCall,
        ref: ModelRef | None,
        resumed: tuple[int, ...] = (),
        suits: Callable[[ReplicaClient], bool] | None = None,
    ) -> AsyncGenerator[list[Delta], None]:
        """The deltas of one call, on the replica that is best for it; with `suits`, on one that suits and lives now.

        Raises the call's PedroError, ReplicaLost where the replica was lost on the way, UnavailableError where there
        is none.
        """
        client = await (self._choose(ref) if suits is None else self._choose_alive(ref, suits))
        async with aclosing(client.generate(call, ref, resumed)) as batches:
            async for batch in batches:
                yield batch

    async def ask(self, request: ControlRequest[T]) -> T:
        """What any one replica answers."""
        client = await self._choose(None)
        try:
            return await client.connection.ask(request)
        except ReplicaLost as error:
            raise UnavailableError("the engine that was asked was lost; try again", code="replica_lost") from error

    async def ask_all(self, request: ControlRequest[T]) -> list[T]:
        """What each replica answers. One that is lost meanwhile is left out; any other error is raised."""
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
        """The client to ask for adapter version `ref`, of those that suit; waits for one where there is none."""

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
