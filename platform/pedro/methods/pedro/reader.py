"""Reads PEDRO and PARA adapters for the engine: one generator a layer, with a learned or a fixed activation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pedro.adapter_kinds import Adapter, Generator, GeneratorWeights
from pedro.adapter_kinds.heads import head_length
from pedro.errors import AdapterError
from pedro.methods.pedro.config import PedroConfig
from pedro.methods.pedro.model import CHILD
from pedro.methods.reader import ROOT, Reader, SavedTensors, check_targets

if TYPE_CHECKING:
    from pedro.methods.architectures import Architecture


def read(config: PedroConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """The generators; an entry that a group of channels shares is repeated for each of them."""
    if config.lacks_head_end:
        raise AdapterError(
            f"conditioning: {config.conditioning} without head_end, the tokens that end it; train it again"
        )
    layers, widths = [], []
    by_layer = config.by_layer(len(architecture.layers))
    for block, (activation, r, orders) in zip(architecture.layers, by_layer, strict=True):
        check_targets(config.targets, block.sites)
        width = [block.sites[target].width for target in config.targets]
        entries = sum(config.entries(width))
        shapes: dict[str, tuple[int, ...]] = {
            "down": (architecture.hidden_size, r),
            "up": (r, entries),
            "bias": (entries,),
        }
        if activation == "rational":
            shapes |= {"a": (orders[0] + 1,), "b": (orders[1],)}
        prefix = f"{ROOT}{block.name}.{CHILD}.pedro_"
        parts = {name: tensors.take(prefix + name, shape) for name, shape in shapes.items()}
        if config.group_size != 1:
            assert isinstance(config.group_size, int), "the tuner puts a number in place of a head"
            parts |= {name: parts[name].repeat_interleave(config.group_size, dim=-1) for name in ("up", "bias")}
        layers.append(GeneratorWeights(**parts, activation=activation))
        widths.append(width)
    generator = Generator(
        targets=tuple(config.targets),
        widths=tuple(widths),
        pool=config.pool,
        pool_source=config.pool_source,
        layers=tuple(layers),
        window=config.window,
        head=None if config.head_end is None else partial(head_length, config.head_end),
    )
    tail = config.scaled_tail
    return Adapter(generator=generator, start=None if tail is None else partial(_tail_begins, tail))


def _tail_begins(tail: int, _prompt_ids: Sequence[int], conditioning_length: int) -> int:
    """Where the last `tail` of the tokens that condition the vectors begin."""
    return max(0, conditioning_length - tail)


READER = Reader(PedroConfig.kind, read)
