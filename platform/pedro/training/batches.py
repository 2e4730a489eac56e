"""Batches: the rows of the k-th, the tensors of a worker's slice, and the loss that an objective takes of them.
torch only.

B rows of a slice, T tokens of its longest row, N supervised tokens, P pairs, V tokens of the vocabulary. Rows are
mappings with `input_ids` (prompt and answer) and `prompt_len`. The order of rows is a pure function of (seed, k):
nothing needs to be stored to resume. As rows on disk are read from anywhere, all of an epoch are shuffled at once,
which a shuffle buffer would only approximate.

An objective, the loss of answers or of preferences between two answers (DPO), processes one slice at a time and returns
sums over it; the loop divides them by the weight of the whole batch, so that workers and slices add up to a single
worker's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from pedro.evaluation.preference import MEASURES, measured, preference_losses, worse
from pedro.methods.output_head import IGNORE, supervised

if TYPE_CHECKING:
    from pedro.training.engines import StepEngine

EncodedRows = Sequence[Mapping[str, Any]]


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


class Objective(Protocol):
    """The loop's interface to an objective."""

    measures: ClassVar[tuple[str, ...]]
    """Names of the metrics reported besides the loss."""

    def sequences(self, rows: EncodedRows) -> EncodedRows:
        """All tokens processed for these rows."""

    def weight(self, rows: EncodedRows) -> int:
        """The divisor of a batch's summed loss."""

    def sums(
        self, engine: StepEngine, rows: EncodedRows, pad_id: int, filler: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over a slice, with its graph, and the sums of the metrics. Without rows the loss is 0."""


@dataclass(frozen=True)
class Answers:
    """The cross entropy of the answers' tokens: supervised fine-tuning. Metric: how many are the likeliest."""

    measures: ClassVar[tuple[str, ...]] = ("token_accuracy",)

    def sequences(self, rows: EncodedRows) -> EncodedRows:
        return rows

    def weight(self, rows: EncodedRows) -> int:
        return supervised_tokens(rows)

    def sums(
        self, engine: StepEngine, rows: EncodedRows, pad_id: int, filler: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = tensors(rows, pad_id, engine.device, filler)
        positions, wanted = supervised(batch.pop("labels"))
        logits = engine.forward(positions, **batch)
        right = (logits.detach().argmax(-1) == wanted).sum()
        return token_loss(logits, wanted), right.float()[None]


@dataclass(frozen=True)
class Preferences:
    """Direct preference optimisation; the reference is the backbone with the adapter off, read in the same batch."""

    beta: float
    measures: ClassVar[tuple[str, ...]] = MEASURES

    def sequences(self, rows: EncodedRows) -> EncodedRows:
        return [*rows, *(worse(row) for row in rows)]

    def weight(self, rows: EncodedRows) -> int:
        return len(rows)

    def sums(
        self, engine: StepEngine, rows: EncodedRows, pad_id: int, filler: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sides = self.sequences(rows)
        counts = [len(row["input_ids"]) - row["prompt_len"] for row in sides]
        batch = tensors(sides, pad_id, engine.device, filler)
        positions, wanted = supervised(batch.pop("labels"))
        with torch.no_grad(), engine.bare():
            reference = log_likelihoods(engine.forward(positions, **batch), wanted, counts)
        policy = log_likelihoods(engine.forward(positions, **batch), wanted, counts)
        losses, rewards = preference_losses(policy.view(2, len(rows)), reference.view(2, len(rows)), self.beta)
        return losses.sum(), measured(rewards.detach())


ANSWERS = Answers()


def objective_of(beta: float | None) -> Objective:
    """DPO with this β, or supervised if None."""
    return ANSWERS if beta is None else Preferences(beta)


def log_likelihoods(logits: torch.Tensor, wanted: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The summed log-probability of each answer under logits [N, V], in float32; answers have `counts` tokens."""
    nats = -torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
    if not counts:
        return nats  # no tokens, but part of the graph, so that a worker without rows takes part in every step
    return torch.stack([tokens.sum() for tokens in nats.split(list(counts))])
