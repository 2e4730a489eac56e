"""Ranks given answers by their likelihood after a prompt: what a model knows, whatever its wording.

A prompt is read once for all of its answers; what it begins with as the one before it is not read again, where the
adapter, if any, makes nothing of what follows. T tokens of the prompt, L answers, W tokens of the longest but its last,
N all of these, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pedro.methods.output_head import logits_at
from pedro.methods.packing import shares_beginnings

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn

MOST_TOKENS = 16_384  # whose keys and values lie in memory at once, the prompt's once for each answer
WORTHWHILE = 8  # tokens: a shorter common beginning is read again


class PromptReader:
    """Reads prompts into `model` and scores answers to them. For as long as the model does not change.

    With an adapter whose vectors are made of prompts nothing is kept from prompt to prompt: keys and values follow
    from them.
    """

    def __init__(self, model: nn.Module) -> None:
        assert reads_once(model), (
            "a model with soft prompts makes a cache of its own, and an aLoRA acts by what it reads"
        )
        self.model = model
        self._keeps = shares_beginnings(model)
        self._ids: list[int] = []
        self._cache: Any = None

    def read(self, prompt: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """The logits [V] after a prompt, and its cache of keys and values: whoever adds to that takes a copy."""
        import torch

        assert prompt, "a prompt has at least one token"
        ids = list(prompt)
        known = common_beginning([self._ids, ids[:-1]]) if self._cache is not None else 0
        cache = self._cache if known >= WORTHWHILE else None
        self._ids, self._cache = [], None
        if cache is None:
            known = 0
        elif cache.get_seq_length() > known:
            cache.crop(known - cache.get_seq_length())
        with torch.no_grad():
            read = self.model(
                input_ids=self._tensor([ids[known:]]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        if self._keeps and all(layer.is_croppable and not layer.is_sliding for layer in read.past_key_values.layers):
            self._ids, self._cache = ids, read.past_key_values
        return read.logits[0, -1].float(), read.past_key_values

    def scores(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """The log-likelihood (nats) of each answer's tokens after the prompt's, and whether each was the likeliest."""
        assert all(answers), "an answer has at least one token"
        logits, cache = self.read(prompt)
        first, greedy = logits.log_softmax(-1), int(logits.argmax())
        found = [(float(first[answer[0]]), answer[0] == greedy) for answer in answers]
        longer = [place for place, answer in enumerate(answers) if len(answer) > 1]
        longest = max(map(len, answers))
        at_once = max(1, MOST_TOKENS // (len(prompt) + longest))
        for start in range(0, len(longer), at_once):
            places = longer[start : start + at_once]
            rest = self._rest(cache, len(prompt), [answers[place] for place in places])
            for place, (nats, same) in zip(places, rest, strict=True):
                found[place] = (found[place][0] + nats, found[place][1] and same)
        return found

    def _rest(self, cache: Any, length: int, answers: Sequence[Sequence[int]]) -> Iterator[tuple[float, bool]]:
        """The same of the answers' tokens but their first, all answers in one pass behind the prompt's cache."""
        import torch

        counts = [len(answer) - 1 for answer in answers]
        width = max(counts)
        branch = copy.deepcopy(cache)
        branch.batch_repeat_interleave(len(answers))  # an adapter's vectors follow
        ids = self._tensor(
            [[*answer[:-1], *[0] * (width - count)] for answer, count in zip(answers, counts, strict=True)]
        )
        read = torch.arange(width, device=ids.device) < self._tensor(counts)[:, None]  # [L, W]
        mask = torch.ones(len(answers), length + width, dtype=torch.long, device=ids.device)
        with torch.no_grad(), logits_at(self.model, read):
            logits = self.model(input_ids=ids, attention_mask=mask, past_key_values=branch, use_cache=True).logits[0]
        logits = logits.float()  # [N, V]
        wanted = self._tensor([token for answer in answers for token in answer[1:]])
        nats = logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(-1)
        same = logits.argmax(-1) == wanted
        for one, all_same in zip(nats.split(counts), same.split(counts), strict=True):
            yield float(one.double().sum()), bool(all_same.all())

    def _tensor(self, values: Any) -> torch.Tensor:
        import torch

        return torch.tensor(values, device=next(self.model.parameters()).device)


def common_beginning(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # in the order of their tokens: whatever these share, all between them do
    return next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first)
    )


def reads_once(model: nn.Module) -> bool:
    """Whether a model goes on from a prompt's cache as if it read the prompt again. PEFT's soft prompts do not, and its
    aLoRA looks for its invocation in what is read now."""
    configs: Mapping[str, PeftConfig] = getattr(model, "peft_config", {})
    return not any(
        config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None) for config in configs.values()
    )


def likeliest(
    reader: PromptReader, prompt: Sequence[int], answers: Sequence[Sequence[int]], lengths: Sequence[int] | None = None
) -> int:
    """Which of the answers is the likeliest as a whole, or with `lengths`, for each unit of its length.

    The first among equals.
    """
    nats = [nats for nats, _ in reader.scores(prompt, answers)]
    if lengths is not None:
        nats = [value / max(1, length) for value, length in zip(nats, lengths, strict=True)]
    return nats.index(max(nats))
