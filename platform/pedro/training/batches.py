"""The rows of the k-th batch, and the tensors of a worker's slice. torch only.

B rows of a slice, T tokens of its longest row. Rows are mappings with `input_ids` (prompt and answer) and
`prompt_len`. The order of rows is a pure function of (seed, k): nothing needs to be stored to resume. As rows on disk
are read from anywhere, all of an epoch are shuffled at once, which a shuffle buffer would only approximate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import torch

from pedro.methods.output_head import IGNORE


class Rows(Protocol):
    """A data set on disk, or a list in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class RowStream:
    """Endless batches: one permutation per epoch, concatenated, so that every batch is full."""

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        assert len(rows) > 0, "a stream needs rows; the caller checks that the split is not empty"
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._order = lru_cache(maxsize=2)(partial(_permutation, len(rows), seed))  # a batch may span two epochs

    def batch(self, k: int) -> list[Mapping[str, Any]]:
        """The rows of the k-th batch, counted from 0."""
        size = len(self.rows)
        positions = range(k * self.batch_size, (k + 1) * self.batch_size)
        return fetch(self.rows, [int(self._order(position // size)[position % size]) for position in positions])


def fetch(rows: Rows, places: Sequence[int]) -> list[Mapping[str, Any]]:
    """The rows at these indices, in one read if the data set is on disk."""
    together = getattr(rows, "__getitems__", None)
    read: list[Mapping[str, Any]] = together(list(places)) if together else [rows[place] for place in places]
    return read


def _permutation(size: int, seed: int, epoch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator)


def supervised_tokens(rows: Sequence[Mapping[str, Any]]) -> int:
    """Answer tokens of the rows, by which the loss of the whole batch is divided."""
    return sum(len(row["input_ids"]) - row["prompt_len"] for row in rows)


def passed_tokens(rows: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of the rows that go through the model, prompts and answers."""
    return sum(len(row["input_ids"]) for row in rows)


def slices(
    rows: Sequence[Mapping[str, Any]], rank: int, world: int, accumulation: int
) -> list[Sequence[Mapping[str, Any]]]:
    """This worker's share of a batch, in `accumulation` slices; one may be empty at the end of a data set."""
    mine = rows[rank::world]
    return [mine[part::accumulation] for part in range(accumulation)]


def tensors(
    rows: Sequence[Mapping[str, Any]], pad_id: int, device: torch.device | str, filler: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, labels [B, T] and prompt_lens [B], padded on the right.

    Without rows: one padding row without supervised tokens, so that the worker takes part in every collective.
    """
    blank = not rows
    rows = rows or [filler]
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.long)
    for b, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"], dtype=torch.long)
        ids[b, : len(tokens)] = tokens
        mask[b, : len(tokens)] = 1
        if not blank:
            labels[b, row["prompt_len"] : len(tokens)] = tokens[row["prompt_len"] :]
    lens = torch.tensor([row["prompt_len"] for row in rows], dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompt_lens": lens}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def token_loss(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Sum of the cross entropies of the tokens `wanted` [N] under logits [N, V], in float32; 0 if N is 0."""
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
