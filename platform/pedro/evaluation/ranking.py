"""Ranks given answers by their likelihood after a prompt: what a model knows, however it would put it.

The prompt is read once for all of its answers. T tokens of the prompt, L answers, W tokens of the longest but its last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def answer_likelihoods(model: nn.Module, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
    """The log-likelihood (nats) of each of the answers' tokens after the prompt's. `model` carries no adapter."""
    import torch

    assert prompt, "a prompt has at least one token"
    assert all(answers), "an answer has at least one token"
    causal: Any = model
    device = next(model.parameters()).device
    with torch.no_grad():
        read = causal(input_ids=torch.tensor([list(prompt)], device=device), use_cache=True, logits_to_keep=1)
        first = read.logits[0, -1].float().log_softmax(-1)
        nats = [float(first[answer[0]]) for answer in answers]
        width = max(map(len, answers)) - 1
        if not width:
            return nats
        cache = read.past_key_values
        cache.batch_repeat_interleave(len(answers))
        rows = [[*answer[:-1], *[0] * (width - len(answer) + 1)] for answer in answers]  # what follows is never read
        mask = torch.ones(len(answers), len(prompt) + width, dtype=torch.long, device=device)
        later = (
            causal(
                input_ids=torch.tensor(rows, device=device), attention_mask=mask, past_key_values=cache, use_cache=True
            )
            .logits.float()
            .log_softmax(-1)
        )  # [L, W, V]
    for place, answer in enumerate(answers):
        nats[place] += sum(float(later[place, at, token]) for at, token in enumerate(answer[1:]))
    return nats


def likeliest(model: nn.Module, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> int:
    """Which of the answers is the likeliest as a whole; the first among equals."""
    nats = answer_likelihoods(model, prompt, answers)
    return nats.index(max(nats))
