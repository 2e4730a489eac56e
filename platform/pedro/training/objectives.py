"""Training objectives: the loss of answers, or of preferences between two answers (DPO). torch only.

An objective processes one slice of a batch at a time and returns sums over it; the loop divides them by the weight of
the whole batch, so that workers and slices add up to a single worker's gradient. N supervised tokens, P pairs, V tokens
of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from pedro.evaluation.preference import MEASURES, measured, preference_losses, worse
from pedro.methods.output_head import supervised
from pedro.training.batches import supervised_tokens, tensors, token_loss

if TYPE_CHECKING:
    from pedro.training.engines import StepEngine

EncodedRows = Sequence[Mapping[str, Any]]


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
