"""How well a model tells better answers from worse ones, as DPO sees it: against a reference. torch only.

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: an answer's reward is β times what the model's log-likelihood of it
gained over the reference's, and the loss of a pair is −log σ of the better answer's reward less the worse one's. The
reference is the backbone without an adapter. P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from pedro.evaluation.scoring import Score
    from pedro.model_protocols import Tokenizer

MEASURES = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")
"""What is told of a pair beside its loss, in the order of `measured`."""


def preference_losses(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair [P], and the rewards [2, P], of log-likelihoods [2, P]: better answers, then worse."""
    rewards = beta * (policy - reference)
    return -torch.nn.functional.logsigmoid(rewards[0] - rewards[1]), rewards


def measured(rewards: torch.Tensor) -> torch.Tensor:
    """Sums over the pairs of rewards [2, P] for each of MEASURES. A tie is half right: the reference has 0.5."""
    margins = rewards[0] - rewards[1]
    return torch.stack([_right(margins).sum(), margins.sum(), rewards[0].sum(), rewards[1].sum()])


def _right(margins: torch.Tensor) -> torch.Tensor:
    return (margins > 0).to(margins) + 0.5 * (margins == 0).to(margins)


def worse(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a preference with its worse answer in the place of the better one."""
    return {**row, "input_ids": row["rejected_ids"]}


def pair_likelihoods(
    model: nn.Module, tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], batch_size: int = 32
) -> torch.Tensor:
    """Log-likelihoods (nats) of the rows' answers given their prompts, [2, P] in float64: better ones, then worse."""
    from pedro.evaluation.scoring import answer_logprobs

    sides = [row for side in (rows, [worse(row) for row in rows]) for row in side]
    found = answer_logprobs(model, tokenizer, sides, batch_size, shared=False)
    return torch.tensor([nats for nats, _ in found], dtype=torch.float64).view(2, len(rows))


def score_pairs(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> Score:
    """`accuracy` is the share of pairs whose better answer has the higher reward, `loss` the mean loss of a pair."""
    from pedro.evaluation.scoring import Score

    losses, rewards = preference_losses(policy, reference, beta)
    pairs = losses.shape[0]
    right = _right(rewards[0] - rewards[1])
    each = tuple((good, loss, 1) for good, loss in zip(right.tolist(), losses.tolist(), strict=True))
    return Score(float(right.sum()), pairs, float(losses.sum()), pairs, each)
