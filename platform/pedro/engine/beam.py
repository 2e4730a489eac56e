"""Beam search over one request's slots.

The hypotheses, their scores and their order are those of transformers' `generate(num_beams=k, do_sample=False)`
(`GenerationMixin._beam_search`), whose arithmetic this follows step by step, also in float32: a step takes the best
(stop tokens + 1) · k continuations of all beams; of the best k, those that end become finished hypotheses; the best k
that do not end are continued.
Legend: K beams, C candidate continuations, V vocabulary.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from pedro.engine.sampler import Logprob, SampleRow, penalised
from pedro.engine.sequence import NOTHING, Detokenizer, Output, Sequence

if TYPE_CHECKING:
    from pedro.engine.request import Request
    from pedro.model_protocols import TokenDecoder

NEVER = -1.0e9  # score of candidates that must not be chosen
STOP_TAIL_TOKENS = 8  # decoded before the last token, plus one per byte of the longest stop text


class BeamSequence(Sequence):
    """A request answered by beam search: one sequence with a slot for each beam, never preempted."""

    preemptible = False

    def __init__(self, request: Request, max_tokens: int, tokenizer: TokenDecoder, eos_ids: frozenset[int]) -> None:
        super().__init__(request, 0, max_tokens, tokenizer, eos_ids)
        self.width = request.params.num_beams
        self.done = False
        self.prompt_logprobs: list[Logprob | None] | None = None
        self._tokenizer = tokenizer
        self._beams: list[list[int]] = [[] for _ in range(self.width)]
        self._scores = torch.full((self.width,), NEVER)  # [K] of the running beams; only one counts at first
        self._scores[0] = 0.0
        self._finished: list[list[int]] = [[] for _ in range(self.width)]
        self._finished_scores = torch.full((self.width,), NEVER)  # [K], best first
        self._is_finished = torch.zeros(self.width, dtype=torch.bool)
        self._can_improve = True

    @property
    def num_made(self) -> int:
        """Tokens of each beam so far."""
        return len(self._beams[0])

    @property
    def tokens_left(self) -> int:
        """How many more tokens each beam may generate."""
        return self.max_tokens - self.num_made

    def last_tokens(self) -> list[tuple[int, int]]:
        """Each beam's slot and its last token."""
        return [(slot, beam[-1]) for slot, beam in zip(self.slots, self._beams, strict=True)]

    def advance(self, logits: torch.Tensor) -> list[tuple[int, int]]:
        """Take the logits after each beam [K, V], after the prompt [1, V], and choose the next beams.

        Returns pairs (a, b) of slots: the answer in a must be copied to b. Sets `done` at the end.
        """
        if self.first_token is None:
            self.first_token = time.monotonic()
        best, parents, tokens = self._continuations(logits)
        made = self.num_made + 1
        ends = torch.tensor([made >= self.max_tokens or self._ends(p, t) for p, t in zip(parents, tokens, strict=True)])
        self._finish(best, [[*self._beams[p], t] for p, t in zip(parents, tokens, strict=True)], ends, made)
        running = best + ends.float() * NEVER
        chosen = running.topk(self.width).indices
        self._scores = running[chosen]
        survivors = chosen.tolist()
        self._beams = [[*self._beams[parents[i]], tokens[i]] for i in survivors]
        worst = self._finished_scores.min() if bool(self._is_finished.all()) else torch.tensor(NEVER)
        self._can_improve = self._can_improve and bool(self._scores[0] / made**self.params.length_penalty > worst)
        full = self.params.early_stopping and bool(self._is_finished.all())
        self.done = not self._can_improve or full or bool(ends.all())
        return self._move([parents[i] for i in survivors])

    def last_outputs(self, finish_reason: str, **fields: Any) -> list[Output]:
        """One Output for each answer: the hypotheses best first, or `finish_reason` for all if the search was cut
        short."""
        fields.setdefault("prompt_logprobs", self.prompt_logprobs)
        if not self.done:
            return [self.output(index, self.num_made, finish_reason, **fields) for index in range(self.request.n)]
        outputs = []
        for index, token_ids in enumerate(self._finished[: self.request.n]):
            text, reason = self._text_and_reason(token_ids)
            outputs.append(self.output(index, len(token_ids), reason, token_ids=token_ids, text=text, **fields))
        return outputs

    def _continuations(self, logits: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
        """The best continuations: accumulated scores [C] best first, the beams they continue, and their tokens."""
        logprobs = torch.log_softmax(logits.float(), -1).expand(self.width, -1)
        barred = self.stop_ids if self.num_made < self.params.min_tokens else NOTHING
        if self.params.penalised or barred:
            prompt = self.request.prompt_ids
            logprobs = penalised(logprobs, [SampleRow(self.params, 0, 0, prompt, beam, barred) for beam in self._beams])
        total = (logprobs + self._scores.to(logprobs.device)[:, None]).reshape(-1)
        count = min(max(2, 1 + len(self.stop_ids)) * self.width, len(total))
        best, at = total.topk(count)
        flat = at.tolist()
        vocabulary = logprobs.shape[-1]
        return best.cpu(), [i // vocabulary for i in flat], [i % vocabulary for i in flat]

    def _ends(self, parent: int, token_id: int) -> bool:
        if token_id in self.stop_ids:
            return True
        if not self.params.stop:
            return False
        tail = STOP_TAIL_TOKENS + max(len(stop.encode()) for stop in self.params.stop)
        text = self._tokenizer.decode([*self._beams[parent][-tail:], token_id], skip_special_tokens=True)
        return any(stop in text for stop in self.params.stop)

    def _finish(self, best: torch.Tensor, hypotheses: list[list[int]], ends: torch.Tensor, made: int) -> None:
        """Add those of the best K continuations that end to the finished hypotheses, and keep the best K of these."""
        ended = ends & (torch.arange(len(best)) < self.width)
        scores = best / made**self.params.length_penalty
        if self.params.early_stopping and bool(self._is_finished.all()):
            scores = scores + NEVER
        if not self._can_improve:
            scores = scores + NEVER
        scores = scores + (~ended).float() * NEVER
        merged = torch.cat((self._finished_scores, scores))
        top = merged.topk(self.width).indices
        self._finished_scores = merged[top]
        self._is_finished = torch.cat((self._is_finished, ended))[top]
        everything = [*self._finished, *hypotheses]
        self._finished = [everything[i] for i in top.tolist()]

    def _move(self, parents: list[int]) -> list[tuple[int, int]]:
        """Assign slots to beams: the first child of a beam stays in its slot, the others move into free ones."""
        before, self.slots = self.slots, []
        left = [before[i] for i in range(self.width) if i not in parents]
        pairs, stayed = [], set()
        for parent in parents:
            if parent not in stayed:
                stayed.add(parent)
                self.slots.append(before[parent])
            else:
                self.slots.append(left.pop())
                pairs.append((before[parent], self.slots[-1]))
        return pairs

    def _text_and_reason(self, token_ids: list[int]) -> tuple[str, str]:
        text, detokenizer = "", Detokenizer(self._tokenizer, self.request.text_before, self.params.stop)
        for token_id in token_ids:
            if token_id in self.stop_ids:
                return text + detokenizer.flush(), "stop"
            piece, stopped = detokenizer.add(token_id)
            text += piece
            if stopped:
                return text, "stop"
        return text + detokenizer.flush(), "length"
