"""An adapter as the engine runs it. Knows nothing of files, slots or requests.

Every kind is some of four parts: a generator of vectors (PEDRO, PARA), constant scales ((IA)³, RED), constant shifts
(RED, bias) and low-rank terms (LoRA). A site is one of the seven projections of a layer:
y = scale · (W x + b) + shift + (x · down) · up.
Legend: D model width, R bottleneck or rank, W output width of a site.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pedro.methods.pedro.generator import GeneratorWeights

SITES = ("q", "k", "v", "o", "gate", "up", "down")


class LowRank(NamedTuple):
    """One site's low-rank term, its scaling folded into `up`."""

    down: torch.Tensor  # [inputs, R]
    up: torch.Tensor  # [R, W]


@dataclass(frozen=True, eq=False)
class Generator:
    """Makes the vectors of a request from its prompt: one set of weights a layer."""

    targets: tuple[str, ...]
    widths: tuple[list[int], ...]  # of the targets, by layer
    pool: str
    pool_source: str
    layers: tuple[GeneratorWeights, ...]
    window: int | None = None  # pool only so many of the prompt's last tokens

    @property
    def form(self) -> tuple:
        """Generators of one form can be run in one batch, their weights stacked."""
        layers = tuple(
            (layer.activation, layer.down.shape[-1], *(None if t is None else len(t) for t in (layer.a, layer.b)))
            for layer in self.layers
        )
        return self.targets, self.pool, self.pool_source, self.window, layers


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything in float32 on the engine's device, one entry a layer where there is any."""

    digest: str
    generator: Generator | None = None
    scale: tuple[dict[str, torch.Tensor], ...] = ()  # site -> [W]
    shift: tuple[dict[str, torch.Tensor], ...] = ()
    low_rank: tuple[dict[str, LowRank], ...] = ()
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nbytes", sum(tensor.nbytes for tensor in self._tensors()))

    @property
    def holds(self) -> bool:
        """Whether every token needs the adapter's weights, so that it must stay until its requests end."""
        return bool(self.low_rank)

    def _tensors(self) -> Iterator[torch.Tensor]:
        if self.generator is not None:
            for layer in self.generator.layers:
                yield from (part for part in layer if isinstance(part, torch.Tensor))
        for sites in (*self.scale, *self.shift):
            yield from sites.values()
        for terms in self.low_rank:
            for term in terms.values():
                yield from term
