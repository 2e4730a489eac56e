"""The messages between an ingress and an engine replica, and their timing. Transport is up to the connection.

One stream per pair carries the outputs of all requests of that ingress on that replica in batches, one per time slice:
an item costs each side one to two milliseconds whatever its size, so tokens and requests must not be separate items.
Everything but generation is a `ControlRequest`, which declares the type of its answer.
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

SLICE_S = 0.03  # the slice with few calls
EVENT_S = 0.004  # cost per call and slice for ingress, proxy and client: more calls, longer slices
LONGEST_SLICE_S = 0.25
HEARTBEAT_S = 1.0  # an idle stream sends its replica's load
SILENCE_S = 30.0  # without an item for this long the stream counts as broken

T = TypeVar("T")
Prompt = str | tuple[Mapping[str, str], ...]


class ReplicaLost(Exception):
    """The replica, or the connection to it, is gone; another must continue its calls.

    `blameless`: calls running there are known not to be the cause.
    """

    def __init__(self, message: str, blameless: bool = False) -> None:
        super().__init__(message)
        self.blameless = blameless


class TokenCounts:
    """Counts the tokens of each choice of one call, to detect lost, duplicated or reordered output."""

    def __init__(self) -> None:
        self._made: dict[int, int] = {}

    def add(self, choice: int, tokens: int, total: int, before: int) -> None:
        """Add `tokens`, which must give `total`; a choice starts at `before`. Raises ReplicaLost."""
        made = self._made.get(choice, before) + tokens
        if made != total:
            raise ReplicaLost(f"choice {choice} has {made} of {total} tokens", blameless=True)
        self._made[choice] = made

    @property
    def total(self) -> int:
        """Tokens of all choices."""
        return sum(self._made.values())


@dataclass(frozen=True)
class Spent:
    """A call's usage as counted by the engine: the last part of a call that was not completed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


OutputPart = list[Delta] | PedroError | ReplicaLost | Spent
"""The deltas of one call, the error that ends it, or its usage, which follows an error or cancellation."""


@dataclass(frozen=True)
class SubmitRequest:
    """A call to a replica. `number` is the ingress's id for it on this stream.

    `ref` is the adapter version (None: the bare backbone); `resumed` are answer tokens that the client already has.
    `backbone` is the digest of the ingress's backbone, empty if not given; `trace` is the parent span, empty if there
    is none.
    """

    number: int
    call: GenerateCall
    ref: ModelRef | None = None
    resumed: tuple[int, ...] = ()
    backbone: str = ""
    trace: str = ""


@dataclass(frozen=True)
class OutputBatch:
    """New output of some calls, by their numbers. `number` is the batch's position in its stream, from 0.

    `load` counts the unfinished calls of the replica, `mine` those of this stream.
    """

    number: int
    load: int
    mine: int
    parts: tuple[tuple[int, OutputPart], ...] = ()


class ReplicaControl(Protocol):
    """Operations of a replica other than generation. `ref` None is the bare backbone."""

    async def tokenize(self, prompt: Prompt, add_special_tokens: bool, ref: ModelRef | None) -> TokenizeResult: ...

    async def detokenize(self, ids: tuple[int, ...]) -> str: ...

    async def tokenizer_info(self) -> dict[str, Any]: ...

    async def residents(self) -> list[AdapterResidence]: ...

    async def load(self, ref: ModelRef, pin: bool) -> list[AdapterResidence]: ...

    async def unpin(self, ref: ModelRef) -> list[AdapterResidence]: ...

    async def unload(self, ref: ModelRef) -> list[AdapterResidence]: ...

    async def metrics(self) -> str: ...


class ControlRequest(ABC, Generic[T]):
    """A request to a replica other than generation; T is its answer."""

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
    """An ingress's connection to one engine replica. Any method raises `ReplicaLost` once it is gone."""

    def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        """The outputs of calls submitted under `stream_id`. When its consumer ends, so do its calls.

        Its first item is empty: then requests may be submitted.
        """
        ...

    async def submit(self, stream_id: str, requests: list[SubmitRequest], cancelled: list[int]) -> None:
        """Start and then end calls. Raises a blameless `ReplicaLost` if none was started."""
        ...

    async def ask(self, request: ControlRequest[T]) -> T:
        """The replica's answer; not used for generation."""
        ...


def slice_s(num_calls: int) -> float:
    """The length of a slice while `num_calls` calls share the stream."""
    return min(max(SLICE_S, EVENT_S * num_calls), LONGEST_SLICE_S)
