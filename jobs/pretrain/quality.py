"""How well a causal LM predicts a text: perplexity over its own tokens, and bits per character.

Bits per character compare models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pedro.data.prompt_format import encode_prompts
from pedro.errors import TrainingError

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

BATCH_TOKENS = 8192
MOST_NATS = 700.0  # a token; what a perplexity can still be computed from
Window = tuple[list[int], int]  # token ids, and from which of them on they count


@dataclass(frozen=True)
class Quality:
    """Of one text. `perplexity` is for each token, `bits_per_char` for each character."""

    chars: int
    tokens: int
    perplexity: float
    bits_per_char: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def measure_quality(model: torch.nn.Module, tokenizer: Tokenizer, pieces: Sequence[str], context: int) -> Quality:
    """Quality on pieces of text, each on its own from BOS on.

    A piece longer than the context is read in windows that overlap by half, so that all but the first tokens are
    predicted from at least half a context. Raises TrainingError for a model whose weights have run away.
    """
    was_training = model.training
    model.eval()
    windows = [window for ids in encode_prompts(tokenizer, pieces) for window in _windows(ids, context)]
    windows.sort(key=lambda window: len(window[0]))
    nats, tokens = 0.0, 0
    for batch in _batches(windows):
        batch_nats = _nats(model, batch)
        nats += batch_nats
        tokens += sum(len(ids) - start for ids, start in batch)
    model.train(was_training)
    if not nats / tokens < MOST_NATS:
        raise TrainingError(
            f"loss: it is {nats / tokens} on held-out text; start again with a lower --lr and a new --out", param="lr"
        )
    chars = sum(map(len, pieces))
    return Quality(chars, tokens, round(math.exp(nats / tokens), 4), round(nats / math.log(2) / chars, 5))


def _windows(ids: list[int], context: int) -> list[Window]:
    """Every token but BOS counts once."""
    first = ids[:context]
    rest = range(context, len(ids), context // 2)
    later = [(ids[at - context // 2 : at + context // 2], context // 2) for at in rest]
    return [(first, 1), *later] if len(first) > 1 else []


def _batches(windows: list[Window]) -> list[list[Window]]:
    """Neighbours by length, at most `BATCH_TOKENS` tokens together."""
    batches: list[list[Window]] = [[]]
    for window in windows:
        if batches[-1] and (len(batches[-1]) + 1) * len(window[0]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(window)
    return [batch for batch in batches if batch]


def _nats(model: torch.nn.Module, batch: list[Window]) -> float:
    """Minus the log-likelihood of the tokens that count. Padding is on the right, where causal attention hides it."""
    device = next(model.parameters()).device
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    counted = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, (window, start) in enumerate(batch):
        ids[row, : len(window)] = torch.tensor(window)
        counted[row, start : len(window)] = True
    ids, counted = ids.to(device), counted.to(device)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()  # [B, T-1, V]
    picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -float(picked[counted[:, 1:]].double().sum())
