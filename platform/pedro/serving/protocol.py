"""What crosses between an ingress and an engine replica, and how often. How it is carried is the connection's own.

One stream a pair carries the outputs of all requests of that ingress on that replica in batches, one for each slice of
time: an item costs each side one to two milliseconds however much it holds, so a token, or a request, must not be one
of its own. What is no part of generation crosses as a `ControlRequest`, which names the type of its answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from pedro.errors import PedroError
from pedro.gateway.backend import AdapterResidence, Delta, GenerateCall, TokenizeResult

if TYPE_CHECKING:
    from pedro.refs import ModelRef

SLICE_S = 0.03  # a slice of a few calls
EVENT_S = 0.004  # what one call's share of a slice costs ingress, proxy and client: with more calls, longer slices
LONGEST_SLICE_S = 0.25
HEARTBEAT_S = 1.0  # an idle stream tells that it lives, and how loaded its replica is
SILENCE_S = 30.0  # no item for so long: the stream is broken, whatever the transport believes

T = TypeVar("T")
Prompt = str | tuple[Mapping[str, str], ...]


class ReplicaLost(Exception):
    """The replica, or the way to it, is gone; what it had not sent is to be asked of another.

    `blameless`: whatever ran there is known not to be why.
    """

    def __init__(self, message: str, blameless: bool = False) -> None:
        super().__init__(message)
        self.blameless = blameless


class TokenCounts:
    """Counts the tokens of each choice of one call, so that nothing lost, doubled or out of order passes for text."""

    def __init__(self) -> None:
        self._made: dict[int, int] = {}

    def add(self, choice: int, tokens: int, total: int, before: int) -> None:
        """`tokens` more came, which should make it `total`; a choice begins with `before`. Raises ReplicaLost."""
        made = self._made.get(choice, before) + tokens
        if made != total:
            raise ReplicaLost(f"choice {choice} has {made} tokens where {total} were made", blameless=True)
        self._made[choice] = made

    @property
    def total(self) -> int:
        """Tokens of all choices."""
        return sum(self._made.values())


@dataclass(frozen=True)
class Spent:
    """What a call used on a replica, by its engine's count: the last part of a call that was not answered whole."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


OutputPart = list[Delta] | PedroError | ReplicaLost | Spent
"""The deltas of one call, the error that ends it, or what it used: that follows the error, or its cancellation."""


@dataclass(frozen=True)
class SubmitRequest:
    """A call on its way to a replica. `number` is the ingress's own name for it on this stream.

    `ref` is the adapter version (None: the bare backbone); `resumed` are answer tokens that the client has already.
    `backbone` is the digest of the one that the ingress knows, empty where it does not say; `trace` the span that this
    is a part of, empty where none is made.
    """

    number: int
    call: GenerateCall
    ref: ModelRef | None = None
    resumed: tuple[int, ...] = ()
    backbone: str = ""
    trace: str = ""


@dataclass(frozen=True)
class OutputBatch:
    """What some calls gained, by their numbers. `number` is the batch's own place in its stream, from 0.

    `load` counts the unfinished calls of the replica, `mine` those of this stream.
    """

    number: int
    load: int
    mine: int
    parts: tuple[tuple[int, OutputPart], ...] = ()


class ReplicaControl(Protocol):
    """What a replica answers beside generation. `ref` None is the bare backbone."""

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool, ref: ModelRef | None) -> TokenizeResult: ...

    async def detokenize(self, ids: tuple[int, ...]) -> str: ...

    async def tokenizer_info(self) -> dict[str, Any]: ...

    async def residents(self) -> list[AdapterResidence]: ...

    async def load(self, ref: ModelRef, pin: bool) -> list[AdapterResidence]: ...

    async def unpin(self, ref: ModelRef) -> list[AdapterResidence]: ...

    async def unload(self, ref: ModelRef) -> list[AdapterResidence]: ...

    async def metrics(self) -> str: ...


class ControlRequest(ABC, Generic[T]):
    """Something asked of a replica beside generation; T is its answer."""

    @abstractmethod
    async def perform(self, replica: ReplicaControl) -> T:
        """The answer. Runs in the replica's process, on its event loop."""


@dataclass(frozen=True)
class Tokenize(ControlRequest[TokenizeResult]):
    prompt: Prompt
    add_special_tokens: bool
    ref: ModelRef | None

    async def perform(self, replica: ReplicaControl) -> TokenizeResult:
        return await replica.tokenize(self.prompt, self.add_special_tokens, self.ref)


@dataclass(frozen=True)
class Detokenize(ControlRequest[str]):
    ids: tuple[int, ...]

    async def perform(self, replica: ReplicaControl) -> str:
        return await replica.detokenize(self.ids)


@dataclass(frozen=True)
class DescribeTokenizer(ControlRequest[dict[str, Any]]):
    async def perform(self, replica: ReplicaControl) -> dict[str, Any]:
        return await replica.tokenizer_info()


@dataclass(frozen=True)
class ListResidents(ControlRequest[list[AdapterResidence]]):
    async def perform(self, replica: ReplicaControl) -> list[AdapterResidence]:
        return await replica.residents()


@dataclass(frozen=True)
class LoadAdapter(ControlRequest[list[AdapterResidence]]):
    ref: ModelRef
    pin: bool = False

    async def perform(self, replica: ReplicaControl) -> list[AdapterResidence]:
        return await replica.load(self.ref, self.pin)


@dataclass(frozen=True)
class UnpinAdapter(ControlRequest[list[AdapterResidence]]):
    ref: ModelRef

    async def perform(self, replica: ReplicaControl) -> list[AdapterResidence]:
        return await replica.unpin(self.ref)


@dataclass(frozen=True)
class UnloadAdapter(ControlRequest[list[AdapterResidence]]):
    ref: ModelRef

    async def perform(self, replica: ReplicaControl) -> list[AdapterResidence]:
        return await replica.unload(self.ref)


@dataclass(frozen=True)
class ReadMetrics(ControlRequest[str]):
    async def perform(self, replica: ReplicaControl) -> str:
        return await replica.metrics()


class ReplicaConnection(Protocol):
    """One engine replica, as an ingress reaches it. Any method raises `ReplicaLost` once it is gone."""

    def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        """The outputs of what is submitted under `stream_id`, from now on. Ends with its consumer, and its calls too.

        Its first item is empty: from then on requests may be submitted.
        """
        ...

    async def submit(self, stream_id: str, requests: list[SubmitRequest], cancelled: list[int]) -> None:
        """Start calls and end others, in this order. Raises a blameless `ReplicaLost` where none was started."""
        ...

    async def ask(self, request: ControlRequest[T]) -> T:
        """The replica's answer; not for the path of a generation."""
        ...


def slice_s(num_calls: int) -> float:
    """How long a slice lasts while `num_calls` calls share the stream."""
    return min(max(SLICE_S, EVENT_S * num_calls), LONGEST_SLICE_S)
