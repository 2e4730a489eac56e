"""An adapter as the engine runs it: some of five parts, whichever method trained it.

A generator of vectors (PEDRO, PARA), constant scales ((IA)³, RED), constant shifts (RED, BitFit), low-rank terms (LoRA
and its kin) and edits of a prompt's tokens behind a layer (LoReFT). A site is one of the seven projections of a layer:
y = scale · (W x + b) + shift + (x · A) · B.
An adapter may act on a row from one of its tokens on (aLoRA); before that the row is the bare backbone's.
Legend: D model width, R bottleneck or rank, W output width of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from pedro.adapter_kinds.generator import GeneratorWeights

SITES = ("q", "k", "v", "o", "gate", "up", "down")
Start = Callable[[Sequence[int], int], int | None]  # as `Adapter.start_in`
Head = Callable[[Sequence[int]], int]  # how many first tokens of a prompt it is


class LowRank(NamedTuple):
    """One site's low-rank term, LoRA's two factors transposed; any scaling is folded into `b`."""

    a: torch.Tensor  # [inputs, R]
    b: torch.Tensor  # [R, W]

    def padded(self, multiple: int) -> LowRank:
        """The same term, in memory of its own, with R and W rounded up to a multiple."""
        rank = (0, -len(self.b) % multiple)
        b = torch.nn.functional.pad(self.b, (0, -self.b.shape[1] % multiple, *rank))
        return LowRank(torch.nn.functional.pad(self.a, rank).contiguous(), b.contiguous())


class Edit(NamedTuple):
    """What is done to a token behind a layer: h ← h + (h · A + c) · B."""

    a: torch.Tensor  # [D, R]
    c: torch.Tensor  # [R]
    b: torch.Tensor  # [R, D]


@dataclass(frozen=True, eq=False)
class Edits:
    """Edits of a prompt's `first` and `last` tokens, one a layer where there is any; an answer has none."""

    first: int
    last: int
    layers: tuple[Edit | None, ...]

    def tokens(self, length: int) -> list[int]:
        """The tokens of a prompt of `length` that are edited, at most half of them from either end."""
        first, last = min(self.first, length // 2), min(self.last, length // 2)
        return [*range(first), *range(length - last, length)]


@dataclass(frozen=True, eq=False)
class Generator:
    """Makes the vectors of a request from its prompt: one set of weights a layer."""

    targets: tuple[str, ...]
    widths: tuple[list[int], ...]  # of the targets, by layer
    pool: str
    pool_source: str
    layers: tuple[GeneratorWeights, ...]
    window: int | None = None  # pool only the last `window` tokens of the prompt
    head: Head | None = None  # pool only this part of the prompt; None: all of it

    def first_pooled(self, length: int) -> int:
        """The first token that its vectors come from, where `length` tokens condition them."""
        return length - 1 if self.pool == "last" else max(0, length - (self.window or length))

    @cached_property  # asked for at every prefill
    def form(self) -> tuple[Any, ...]:
        """Generators of one form can be run in one batch, their weights stacked."""
        layers = tuple(
            (layer.activation, layer.down.shape[-1], *(None if t is None else len(t) for t in (layer.a, layer.b)))
            for layer in self.layers
        )
        return self.targets, self.pool, self.pool_source, self.window, layers


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything in float32 on one device, one entry a layer where there is any."""

    generator: Generator | None = None
    scale: tuple[dict[str, torch.Tensor], ...] = ()  # site -> [W]
    shift: tuple[dict[str, torch.Tensor], ...] = ()
    low_rank: tuple[dict[str, LowRank], ...] = ()
    edits: tuple[Edits, ...] = ()
    start: Start | None = None  # None: it acts from the first token on
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(tensor.nbytes for tensor in self._tensors()))

    @cached_property  # asked for at every prefill
    def must_stay(self) -> bool:
        """Whether it is needed until its requests end: for decoding, or for a prompt that is read again after a
        preemption."""
        return bool(self.low_rank or self.edits)

    @cached_property
    def reads_prompt(self) -> bool:
        """Whether what it does to a token depends on which prompt that stands in."""
        return self.generator is not None or bool(self.edits)

    def start_in(self, prompt_ids: Sequence[int], conditioning_length: int) -> int | None:
        """The first token of a prompt that the adapter acts on; None: on none, and on none of the answer."""
        return 0 if self.start is None else self.start(prompt_ids, conditioning_length)

    def conditioned_by(self, prompt_ids: Sequence[int]) -> int:
        """How many first tokens of a prompt its vectors come from."""
        head = None if self.generator is None else self.generator.head
        return len(prompt_ids) if head is None else head(prompt_ids)

    def padded(self, multiple: int) -> Adapter:
        """The adapter with the ranks and outputs of its low-rank terms rounded up to a multiple."""
        if not self.low_rank:
            return self
        layers = tuple({site: term.padded(multiple) for site, term in terms.items()} for terms in self.low_rank)
        return replace(self, low_rank=layers)

    def _tensors(self) -> Iterator[torch.Tensor]:
        if self.generator is not None:
            for layer in self.generator.layers:
                parts = (layer.down, layer.up, layer.bias, layer.a, layer.b)
                yield from (part for part in parts if part is not None)
        for sites in (*self.scale, *self.shift):
            yield from sites.values()
        for terms in self.low_rank:
            for term in terms.values():
                yield from term
        for edits in self.edits:
            for edit in edits.layers:
                yield from edit or ()
