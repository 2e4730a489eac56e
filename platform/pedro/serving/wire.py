"""What crosses between an ingress and an engine replica, and how often. Knows nothing of how it is carried.

One stream a pair carries the outputs of all calls of that ingress on that replica in slices of time: an item costs
each side one to two milliseconds however much it holds, so a token, or a request, must not be one of its own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

from pedro.errors import PedroError
from pedro.gateway.backend import Delta, GenerateCall
from pedro.refs import ModelRef

SLICE_S = 0.03  # a slice of a few calls
EVENT_S = 0.004  # what one call's share of a slice costs ingress, proxy and client: with more calls, longer slices
LONGEST_SLICE_S = 0.25
HEARTBEAT_S = 1.0  # an idle stream tells that it lives, and how loaded its replica is
SILENCE_S = 30.0  # no item for so long: the stream is broken, whatever the transport believes


@dataclass(frozen=True)
class Posted:
    """A call on its way to a replica. `number` is the ingress's own name for it on this stream.

    `ref` is the adapter version (None: the bare backbone); `resumed` are answer tokens that the client has already.
    `backbone` is the digest of the one that the ingress knows, empty where it does not say.
    """

    number: int
    call: GenerateCall
    ref: ModelRef | None = None
    resumed: tuple[int, ...] = ()
    backbone: str = ""


@dataclass(frozen=True)
class Slice:
    """What some calls gained: each its deltas, or the error that ends it.

    `load` counts the unfinished calls of the replica, `mine` those of this stream.
    """

    load: int
    mine: int
    parts: tuple[tuple[int, list[Delta] | PedroError], ...] = ()


class Peer(Protocol):
    """One engine replica, as an ingress reaches it. Any method raises `ReplicaLost` once it is gone."""

    def stream(self, link: str) -> AsyncGenerator[Slice, None]:
        """The outputs of the calls posted under `link`, from now on. Ends with its consumer, and with it its calls."""
        ...

    async def post(self, link: str, calls: list[Posted], cancelled: list[int]) -> None:
        """Start calls and end others, in this order."""
        ...

    async def ask(self, method: str, *arguments: Any) -> Any:
        """What the replica's `method` answers; for operators, not for the path of a request."""
        ...


class ReplicaLost(Exception):
    """The replica, or the way to it, is gone; what it had not sent is to be asked of another."""


def slice_s(num_calls: int) -> float:
    """How long a slice lasts while so many calls share the stream."""
    return min(max(SLICE_S, EVENT_S * num_calls), LONGEST_SLICE_S)
