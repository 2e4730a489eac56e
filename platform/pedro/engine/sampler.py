"""Chooses tokens from logits. Knows nothing of models, queues or text.

Randomness is a function of (seed, choice, position) alone: one uniform number a token, so that neighbours,
preemption and failover change nothing. Greedy rows are a plain argmax.
Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from pedro.engine.sequence import SamplingParams, TokenLogprob


@dataclass(frozen=True)
class SampleRow:
    """What sampling needs to know of a sequence: its parameters, where it stands, and its tokens."""

    params: SamplingParams
    seed: int
    choice: int
    prompt_ids: list[int]
    output_ids: list[int]


@dataclass(frozen=True)
class Sampled:
    """A chosen token; `finite` is False where the logits were not numbers, and the token then means nothing."""

    token_id: int
    logprob: TokenLogprob | None
    finite: bool


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on the three alone."""
    key = f"{seed}:{choice}:{position}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2**53


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: list[SampleRow]) -> list[Sampled]:
    """One token for each of `rows` from logits [R, V] in float32."""
    finite = torch.isfinite(logits).all(-1)
    wants = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits[wants] if wants else None
    scores = _penalised(logits, rows)
    chosen = scores.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(scores[drawn], [rows[i] for i in drawn])
    tokens, good = chosen.tolist(), finite.tolist()
    logprobs: dict[int, TokenLogprob] = {}
    if raw is not None:
        most = max(rows[i].params.logprobs or 0 for i in wants)
        picked = token_logprobs(raw, [tokens[i] for i in wants], most)
        logprobs = {
            i: TokenLogprob(lp.token_id, lp.logprob, lp.top[: rows[i].params.logprobs])
            for i, lp in zip(wants, picked, strict=True)
        }
    return [Sampled(token, logprobs.get(i), ok) for i, (token, ok) in enumerate(zip(tokens, good, strict=True))]


def token_logprobs(logits: torch.Tensor, token_ids: list[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of `token_ids` [R] under logits [R, V], each with the `top` likeliest tokens."""
    logprobs = torch.log_softmax(logits.float(), -1)
    index = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logprobs.gather(1, index)[:, 0].tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]), -1)
    tops = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(t, o, best) for t, o, best in zip(token_ids, own, tops, strict=True)]


def _penalised(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Logits after the bias and the repetition, presence and frequency penalties; untouched where no row has any.

    Repetition as in CTRL (arXiv 1909.05858, section 4.1); presence and frequency as in the OpenAI API reference.
    """
    scores = logits
    for i, row in enumerate(rows):
        params = row.params
        flat = params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty
        if flat and not params.logit_bias:
            continue
        scores = logits.clone() if scores is logits else scores
        if params.repetition_penalty != 1:
            seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), device=logits.device)
            part = scores[i, seen]
            scores[i, seen] = torch.where(part > 0, part / params.repetition_penalty, part * params.repetition_penalty)
        if row.output_ids and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.tensor(row.output_ids, device=logits.device).unique(return_counts=True)
            scores[i, ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            scores[i, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    return scores


def _draw(scores: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Tokens [R] drawn from scores [R, V]: temperature, then top-k, top-p and min-p, each on what the last left."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    temperature = column([row.params.temperature for row in rows])
    probs = torch.softmax(torch.nan_to_num(scores).double() / temperature, -1)
    if any(row.params.top_k or row.params.top_p < 1 for row in rows):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(probs.shape[-1], device=probs.device)[None, :]
        top_k = column([row.params.top_k or probs.shape[-1] for row in rows])
        ordered = ordered.where(rank < top_k, 0.0)
        ordered /= ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest token always stays
        ordered = ordered.where(before < column([row.params.top_p for row in rows]), 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    if any(row.params.min_p for row in rows):
        least = probs.max(-1, keepdim=True).values * column([row.params.min_p for row in rows])
        probs = probs.where(probs >= least, 0.0)
    total = probs.cumsum(-1)
    points = column([uniform(row.seed, row.choice, len(row.output_ids)) for row in rows]) * total[:, -1:]
    return torch.searchsorted(total, points, right=True)[:, 0].clamp_max(probs.shape[-1] - 1)
