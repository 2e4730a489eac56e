"""Runs prefills and decode steps on the model. Holds the tensors and no policy: who runs when is decided elsewhere.

Batches are packed, never padded: the tokens of all rows stand in one line [1, N], so a row costs its own length.
Legend: N tokens of the packed batch, B rows, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from pedro.engine.attention import DecodeStep, PrefillStep, Segment
from pedro.engine.generators import GeneratorAdapter
from pedro.engine.kv_cache import KVCache
from pedro.engine.sampler import token_logprobs
from pedro.engine.sequence import TokenLogprob
from pedro.engine.trunk import Flow, Head, make_trunk
from pedro.engine.vectors import Conditioned, Kept, Vectors
from pedro.methods.architectures import describe

HEAD_CHUNK = 256  # prompt positions whose logits exist at once


@dataclass(frozen=True)
class PrefillRow:
    """A prompt to read into `slot`. `prompt_logprobs` asks for those of its tokens, with that many alternatives.

    `kept` is what a preempted request kept, used in place of the adapter.
    """

    slot: int
    token_ids: list[int]
    conditioning_length: int
    adapter: GeneratorAdapter | None = None
    kept: Kept | None = None
    prompt_logprobs: int | None = None


class Logits(NamedTuple):
    """What the model says comes next. `values` is valid until the runner's next call: copy what must stay."""

    values: torch.Tensor  # [B, V] float32
    best: list[int] | None = None  # argmax of each row where it was computed on the way; -1 where not finite


@dataclass(frozen=True)
class DecodeRow:
    """The last token of the sequence in `slot`, which stands at `position`."""

    slot: int
    token_id: int
    position: int


@dataclass
class _Prefill:
    rows: list[PrefillRow]
    conditioned: list[Conditioned]
    step: PrefillStep
    flow: Flow


class Runner:
    """A model, its KV cache and the vectors of its slots. One prefill may be under way between decode steps."""

    def __init__(self, model, slots: int, length: int) -> None:
        self.architecture = describe(model)
        self.trunk = make_trunk(model)
        self.num_parts = self.trunk.num_parts
        self.device = next(model.parameters()).device
        self._head = Head(model)
        config = model.config
        heads = config.num_attention_heads
        self.cache = KVCache(
            config.num_hidden_layers,
            slots,
            getattr(config, "num_key_value_heads", None) or heads,
            length,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            next(model.parameters()).dtype,
            self.device,
        )
        self.vectors = Vectors(self.architecture, slots, self.device)
        self._prefill: _Prefill | None = None

    @torch.inference_mode()
    def begin(self, rows: list[PrefillRow]) -> None:
        """Take up a prefill; `advance` runs it."""
        segments, conditioned, start = [], [], 0
        for row in rows:
            segment = Segment(start, start + len(row.token_ids), row.slot)
            segments.append(segment)
            conditioned.append(Conditioned(segment, row.conditioning_length, row.adapter, row.kept))
            start = segment.stop
        ids = torch.tensor([[t for row in rows for t in row.token_ids]], device=self.device)
        positions = torch.tensor([[p for row in rows for p in range(len(row.token_ids))]], device=self.device)
        self._prefill = _Prefill(rows, conditioned, PrefillStep(self.cache, segments), Flow(ids, positions))

    @torch.inference_mode()
    def advance(self, last: int) -> None:
        """Run the prefill's layers up to `last`."""
        assert self._prefill is not None, "no prefill is under way"
        with self.vectors.prefilling(self._prefill.conditioned):
            self.trunk.advance(self._prefill.flow, self._prefill.step, last)

    @torch.inference_mode()
    def end(self) -> tuple[Logits, list[list[TokenLogprob | None] | None]]:
        """The logits after each prompt, and the prompts' own log-probabilities where asked for."""
        assert self._prefill is not None, "no prefill is under way"
        prefill, self._prefill = self._prefill, None
        hidden = self.trunk.finish(prefill.flow)  # [N, D]
        last = torch.tensor([segment.stop - 1 for segment in prefill.step.segments], device=self.device)
        logprobs = [
            None if row.prompt_logprobs is None else self._prompt_logprobs(hidden[segment.start : segment.stop], row)
            for row, segment in zip(prefill.rows, prefill.step.segments, strict=True)
        ]
        return Logits(self._head(hidden[last])), logprobs

    def abandon(self) -> None:
        """Forget the prefill under way."""
        self._prefill = None

    @torch.inference_mode()
    def decode(self, rows: list[DecodeRow]) -> Logits:
        """One step for every row: the logits of the next token, in the order of `rows`."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].slot)
        ordered = [rows[i] for i in order]
        slots, positions = [row.slot for row in ordered], [row.position for row in ordered]
        step = DecodeStep(self.cache, slots, positions, self.device)
        flow = Flow(torch.tensor([[row.token_id for row in ordered]], device=self.device), step.positions[None])
        with self.vectors.decoding(step, slots):
            self.trunk.advance(flow, step, self.num_parts)
        logits = self._head(self.trunk.finish(flow))
        back = torch.empty(len(rows), dtype=torch.long, device=self.device)
        back[torch.tensor(order, device=self.device)] = torch.arange(len(rows), device=self.device)
        return Logits(logits[back])

    @torch.inference_mode()
    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Give the slots `targets` the first `length` positions of `source`, and its vectors."""
        self.cache.move([source] * len(targets), targets, 0, length)
        self.vectors.copy(source, targets)

    @torch.inference_mode()
    def reorder(self, pairs: list[tuple[int, int]], start: int, stop: int) -> None:
        """Simultaneously for each (a, b): slot b takes positions [start, stop) of slot a."""
        if pairs:
            self.cache.move([a for a, _ in pairs], [b for _, b in pairs], start, stop)

    @torch.inference_mode()
    def keep(self, slot: int) -> Kept:
        """What must outlive a preemption of the sequence in `slot`, in memory of its own."""
        return self.vectors.keep(slot)

    def release(self, slot: int) -> None:
        """The sequence in `slot` ended or was preempted: nothing of it is needed any more."""

    def _prompt_logprobs(self, hidden: torch.Tensor, row: PrefillRow) -> list[TokenLogprob | None]:
        """Of each prompt token given those before it; the first has none. hidden [T, D]."""
        result: list[TokenLogprob | None] = [None]
        for start in range(0, len(row.token_ids) - 1, HEAD_CHUNK):
            stop = min(start + HEAD_CHUNK, len(row.token_ids) - 1)
            logits = self._head(hidden[start:stop])
            result += token_logprobs(logits, row.token_ids[start + 1 : stop + 1], row.prompt_logprobs or 0)
        return result
