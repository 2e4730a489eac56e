"""Chooses tokens from logits.

Randomness depends on (seed, choice, position) only: one uniform number per token, so that other rows, preemption and
failover change nothing. Greedy rows are a plain argmax, which is free if the model already computed it.
Legend: R rows, V vocabulary, C candidates, N (row, token) pairs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pedro.engine.token_mask import allowed

if TYPE_CHECKING:
    from pedro.engine.request import SamplingParams

LEAST_TEMPERATURE = 1e-6  # smaller ones would divide by zero in float32
LEAST_TOP_P = 1e-6  # smaller ones round to zero in float32, which would drop every token
CANDIDATES = 256  # top-k and top-p first consider this many likeliest tokens, and all only if these are too few


@dataclass(frozen=True)
class SampleRow:
    """A sequence's input to sampling: parameters, position and tokens."""

    params: SamplingParams
    seed: int
    choice: int
    prompt_ids: list[int]
    output_ids: list[int]
    barred: frozenset[int] = frozenset()  # tokens that cannot be chosen
    mask: torch.Tensor | None = None  # allowed tokens, as bits (`TokenMask.bits`)


@dataclass(frozen=True)
class Logprob:
    """A token, its log-probability, and the likeliest tokens at its position with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Sampled:
    """A sampled token, -1 if the logits are not finite, and its log-probability if requested."""

    token_id: int
    logprob: Logprob | None


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends only on the arguments."""
    key = f"{seed}:{choice}:{position}".encode()
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 11) / 2**53


@torch.inference_mode()
def greedy(logits: torch.Tensor) -> list[int]:
    """The likeliest token of each row of [R, V]; -1 if the row contains non-finite numbers."""
    best, tokens = logits.max(-1)  # NaN and infinity both win
    return [token if math.isfinite(value) else -1 for token, value in zip(tokens.tolist(), best.tolist(), strict=True)]


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: list[SampleRow]) -> list[Sampled]:
    """One token for each of `rows` from logits [R, V] in float32."""
    wants = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    scores = penalised(logits, rows)
    tokens = greedy(scores)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0 and tokens[i] >= 0]
    if drawn:
        part = scores if len(drawn) == len(rows) else scores[drawn]
        for i, token in zip(drawn, _draw(part, [rows[i] for i in drawn]), strict=True):
            tokens[i] = token
    logprobs: dict[int, Logprob] = {}
    if wants:
        most = max(rows[i].params.logprobs or 0 for i in wants)
        picked = token_logprobs(logits[wants], [max(0, tokens[i]) for i in wants], most)
        logprobs = {
            i: Logprob(lp.token_id, lp.logprob, lp.top[: rows[i].params.logprobs])
            for i, lp in zip(wants, picked, strict=True)
        }
    return [Sampled(token, logprobs.get(i)) for i, token in enumerate(tokens)]


def token_logprobs(logits: torch.Tensor, token_ids: list[int], top: int) -> list[Logprob]:
    """Log-probabilities of `token_ids` [R] under logits [R, V], each with the `top` likeliest tokens."""
    logprobs = torch.log_softmax(logits.float(), -1)
    index = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logprobs.gather(1, index)[:, 0].tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]), -1)
    tops = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Logprob(t, o, best) for t, o, best in zip(token_ids, own, tops, strict=True)]


def penalised(logits: torch.Tensor, rows: list[SampleRow]) -> torch.Tensor:
    """Logits [R, V] after bias, repetition, presence and frequency penalties and barred tokens; unchanged if there are
    none.

    Repetition as in CTRL (arXiv 1909.05858, section 4.1); presence and frequency as in the OpenAI API reference.
    """
    if not any(row.params.penalised or row.barred or row.mask is not None for row in rows):
        return logits
    scores, params = logits.clone(), [row.params for row in rows]
    repeated = [[*r.prompt_ids, *r.output_ids] if p.repetition_penalty != 1 else [] for r, p in zip(rows, params)]  # noqa: B905
    if any(repeated):
        at, ids, _ = _pairs(repeated, logits)
        part, penalty = scores[at, ids], _column([p.repetition_penalty for p in params], scores)[at]
        scores[at, ids] = torch.where(part > 0, part / penalty, part * penalty)
    said = [r.output_ids if p.presence_penalty or p.frequency_penalty else [] for r, p in zip(rows, params)]  # noqa: B905
    if any(said):
        at, ids, counts = _pairs(said, logits)
        presence, frequency = (
            _column([getattr(p, name) for p in params], scores) for name in ("presence_penalty", "frequency_penalty")
        )
        scores[at, ids] -= presence[at] + frequency[at] * counts
    for i, biases in enumerate(p.logit_bias for p in params):
        if biases:
            ids = torch.tensor(list(biases), device=logits.device)
            scores[i, ids] += _column(list(biases.values()), scores)
    for i, row in enumerate(rows):
        if row.barred:
            scores[i, list(row.barred)] = -math.inf
    masks = {i: row.mask for i, row in enumerate(rows) if row.mask is not None}
    if masks:
        let = allowed(list(masks.values()), scores.shape[-1], scores.device)
        if len(masks) == len(rows):
            scores.masked_fill_(~let, -math.inf)
        else:
            scores[list(masks)] = scores[list(masks)].masked_fill(~let, -math.inf)
    return scores


def _pairs(token_ids: list[list[int]], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The distinct pairs of a row and a token [N] in it, and how often each occurs."""
    vocabulary = logits.shape[-1]
    flat = torch.cat([torch.tensor(ids, dtype=torch.long) + i * vocabulary for i, ids in enumerate(token_ids)])
    keys, counts = flat.to(logits.device).unique(return_counts=True)
    return keys // vocabulary, keys % vocabulary, counts


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def _draw(scores: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    """Tokens drawn from scores [R, V]: temperature, then top-k, top-p and min-p, each applied to the previous
    result."""
    temperature = _column([max(row.params.temperature, LEAST_TEMPERATURE) for row in rows], scores)[:, None]
    probs = (scores - scores.amax(-1, keepdim=True)).div_(temperature).softmax(-1)
    points = [uniform(row.seed, row.choice, len(row.output_ids)) for row in rows]
    tokens = [0] * len(rows)
    for indices, ordered, ids in _ordered(probs, [row.params for row in rows]):
        total = _filtered(ordered, [rows[i].params for i in indices]).double().cumsum(-1)
        reached = torch.searchsorted(
            total, _column([points[i] for i in indices], total)[:, None] * total[:, -1:], right=True
        )
        reached = reached.clamp_max(total.shape[-1] - 1)
        drawn = reached if ids is None else ids.gather(1, reached)
        for i, token in zip(indices, drawn[:, 0].tolist(), strict=True):
            tokens[i] = token
    return tokens


def _ordered(
    probs: torch.Tensor, params: list[SamplingParams]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor | None]]:
    """The rows of probs [R, V] in groups: their indices, their candidates' probabilities [r, C] and tokens.

    If top-k or top-p need an order, the likeliest come first, ties by token; else the order is unchanged. A row's group
    depends only on the row itself, so that other rows cannot change the result.
    """
    ranked = [i for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    if len(ranked) < len(params):
        free = sorted(set(range(len(params))) - set(ranked))
        yield free, probs[free] if ranked else probs, None
    if not ranked:
        return
    probs = probs[ranked]
    if probs.shape[-1] > CANDIDATES:
        ids = probs.topk(CANDIDATES, sorted=False).indices.sort(-1).values
        values, order = probs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        sure = values > values[:, -1:]  # tokens not considered may tie with the last
        counts, masses = sure.sum(-1).tolist(), values.where(sure, 0.0).sum(-1).tolist()
        enough = [
            p.top_k <= count if p.top_k else mass >= p.top_p
            for p, count, mass in zip((params[i] for i in ranked), counts, masses, strict=True)
        ]
        some = [j for j, good in enumerate(enough) if good]
        if some:
            yield [ranked[j] for j in some], values[some], ids.gather(1, order)[some]
        rest = [j for j, good in enumerate(enough) if not good]
        if not rest:
            return
        probs, ranked = probs[rest], [ranked[j] for j in rest]
    yield ranked, *probs.sort(dim=-1, descending=True, stable=True)


def _filtered(probs: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """probs [R, C] with zeros for tokens dropped by a filter; the likeliest is always kept."""
    if any(p.top_k or p.top_p < 1 for p in params):
        rank = torch.arange(probs.shape[-1], device=probs.device)
        top_k = _column([p.top_k if 0 < p.top_k < len(rank) else math.inf for p in params], probs)[:, None]
        kept = probs.where(rank < top_k, 0.0)
        share = kept / kept.sum(-1, keepdim=True).where(top_k < math.inf, 1.0)
        top_p = _column([max(p.top_p, LEAST_TOP_P) if p.top_p < 1 else math.inf for p in params], probs)[:, None]
        probs = kept.where(share.cumsum(-1) - share < top_p, 0.0)
    if any(p.min_p for p in params):
        least = probs.amax(-1, keepdim=True) * _column([p.min_p for p in params], probs)[:, None]
        probs = probs.where(probs >= least, 0.0)
    return probs
