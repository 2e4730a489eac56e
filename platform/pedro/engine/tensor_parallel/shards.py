"""Which part of the backbone and of an adapter belongs to a rank. Only numbers and slices; no processes, no files.

A layer is split as in Megatron-LM (arXiv 1909.08053): q, k, v, gate and up by outputs, so that a rank has whole heads;
o and down by inputs, so that the ranks' partial results are summed. Vectors, and the side of a low-rank term that faces
a split projection, are split with it. Hidden states are complete on every rank, so generators pool them as usual.
Legend: W output width of a site, K its input width, R rank, D model width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pedro.adapter_kinds import Adapter, Generator, LowRank
from pedro.errors import BackboneError
from pedro.methods.architectures import Architecture, Rows, head_width, projection_paths

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

SPLIT = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Architectures whose layers can compute on a subset of their heads."""
BY_INPUTS = ("o", "down")


class Shard(NamedTuple):
    """One of `size` equal parts."""

    rank: int
    size: int

    def of(self, width: int) -> slice:
        """This part of `width` numbers."""
        part = width // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def of_vocabulary(self, tokens: int) -> slice:
        """This part of the vocabulary; the last ones may be shorter."""
        part = -(-tokens // self.size)
        return slice(min(tokens, self.rank * part), min(tokens, (self.rank + 1) * part))


@dataclass(frozen=True)
class Cut:
    """The part of a stored tensor: consecutive ranges of rows, and one range of columns of each."""

    rows: tuple[slice, ...] = (slice(None),)
    columns: slice | None = None


def check_split(config: ModelConfig, size: int, name: str) -> None:
    """Raise BackboneError if the backbone `name` cannot be split over `size` ranks."""
    if config.model_type not in SPLIT:
        raise BackboneError(
            f"tensor_parallel_size: {name!r} is of type {config.model_type}, and only {', '.join(SPLIT)} can be split; "
            "use tensor_parallel_size: 1",
            param="tensor_parallel_size",
        )
    counts = _counts(config)
    if wrong := [f"{count} {what}" for what, count in counts.items() if count % size]:
        most = max(counts.values())
        fits = [str(n) for n in range(1, most + 1) if not any(count % n for count in counts.values())]
        raise BackboneError(
            f"tensor_parallel_size: {size} does not divide the {' and the '.join(wrong)} of {name!r}; "
            f"choose {' or '.join(fits)}",
            param="tensor_parallel_size",
        )


def local_config(config: Any, shard: Shard) -> Any:
    """The config of a model with only this rank's heads and MLP channels, and the full width."""
    local = copy.deepcopy(config)
    local.head_dim = head_width(config)
    local.num_key_value_heads = _kv_heads(config) // shard.size
    local.num_attention_heads = config.num_attention_heads // shard.size
    local.intermediate_size = config.intermediate_size // shard.size
    return local


def cuts_of(architecture: Architecture, config: ModelConfig, shard: Shard) -> dict[str, Cut]:
    """How this rank slices the projections' tensors, by name; others are not split. `architecture` is the whole
    model's."""
    made: dict[str, Cut] = {}
    paths = projection_paths(config)
    for layer in architecture.layers:
        runs: dict[str, list[slice]] = {}
        for name, site in layer.sites.items():
            runs.setdefault(f"{layer.name}.{paths[name]}", []).append(_within(site.rows, site.width, shard))
        for path, rows in runs.items():
            made[f"{path}.weight"] = made[f"{path}.bias"] = Cut(tuple(sorted(rows, key=lambda run: run.start)))
        for name, module in (("o", layer.output), ("down", layer.down)):
            inputs: Any = module.in_features
            made[f"{layer.name}.{paths[name]}.weight"] = Cut(columns=shard.of(inputs))
    return made


def summed_biases(architecture: Architecture, config: ModelConfig) -> set[str]:
    """Tensors that are added to a sum over the ranks, and so belong to one rank only."""
    paths = projection_paths(config)
    return {f"{layer.name}.{paths[name]}.bias" for layer in architecture.layers for name in BY_INPUTS}


def cut_adapter(adapter: Adapter, shard: Shard) -> Adapter:
    """This rank's part of an adapter, copied.

    A scale on o or down applies to every rank's partial result; a shift there is only added on the first rank.
    """

    def cut(site: str, row: torch.Tensor) -> torch.Tensor:
        return row.clone() if site in BY_INPUTS else row[shard.of(len(row))].clone()

    def low_rank(site: str, term: LowRank) -> LowRank:
        if site in BY_INPUTS:
            return LowRank(term.a[shard.of(len(term.a))].clone(), term.b.contiguous())
        return LowRank(term.a.contiguous(), term.b[:, shard.of(term.b.shape[1])].contiguous())

    return replace(
        adapter,
        generator=None if adapter.generator is None else _cut_generator(adapter.generator, shard),
        scale=tuple({site: cut(site, row) for site, row in sites.items()} for sites in adapter.scale),
        shift=tuple(
            {site: cut(site, row) for site, row in sites.items() if site not in BY_INPUTS or shard.rank == 0}
            for sites in adapter.shift
        ),
        low_rank=tuple({site: low_rank(site, term) for site, term in sites.items()} for sites in adapter.low_rank),
    )


def _cut_generator(generator: Generator, shard: Shard) -> Generator:
    """The same bottleneck on every rank; each generates only the vectors of its own outputs."""
    layers, widths = [], []
    for weights, whole in zip(generator.layers, generator.widths, strict=True):
        kept, start, local = [], 0, []
        for site, width in zip(generator.targets, whole, strict=True):
            part = slice(0, width) if site in BY_INPUTS else shard.of(width)
            kept.append(torch.arange(start + part.start, start + part.stop, device=weights.up.device))
            start += width
            local.append(part.stop - part.start)
        index = torch.cat(kept)
        layers.append(weights._replace(up=weights.up[:, index], bias=weights.bias[index]))
        widths.append(local)
    return replace(generator, layers=tuple(layers), widths=tuple(widths))


def _within(rows: Rows, width: int, shard: Shard) -> slice:
    """This rank's rows of a site, within its module's output."""
    assert rows is None or isinstance(rows, slice), "heads are not interleaved in models that can be split"
    start = 0 if rows is None else rows.start
    part = shard.of(width)
    return slice(start + part.start, start + part.stop)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _counts(config: Any) -> dict[str, int]:
    return {
        "attention heads": config.num_attention_heads,
        "key-value heads": _kv_heads(config),
        "MLP channels": config.intermediate_size,
    }
