"""Runs prefills and decode steps on the model. Owns the tensors and contains no policy: the scheduler decides who runs.

Batches are packed, never padded: the tokens of all rows are concatenated, so a row only costs its own length.
Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pedro.engine import native_model
from pedro.engine.graphs import GraphCapture, find_paged_attention, uses_graphs
from pedro.engine.kernel_threads import granted_threads
from pedro.engine.kv_blocks import BLOCK, KVBlocks
from pedro.engine.kv_budget import KVBudget, allowed_blocks, check_whole
from pedro.engine.kv_cache import KVCache, PagedKVCache, SlotCache
from pedro.engine.modulation import ConditionedRow, GeneratorBatch, Modulation, PreemptedState, Segment, SlotRows
from pedro.engine.native_model import NativeModel
from pedro.engine.sampler import token_logprobs
from pedro.engine.torch_model import TorchModel, refuse_unfit, softcapped
from pedro.errors import BackboneError, PedroError
from pedro.methods.architectures import config_of, describe
from pedro.methods.servable import read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.adapter_kinds import Adapter
    from pedro.engine.model_executor import Logits, ModelExecutor
    from pedro.engine.sampler import Logprob

KERNELS = ("auto", "native", "torch")
HEAD_CHUNK = 256  # prompt positions whose logits are in memory together


@dataclass(frozen=True)
class PrefillRow:
    """A prompt to read into `slot`. `prompt_logprobs`: return those of its tokens, with that many alternatives.

    `pooling` ("last" or "mean"): return its embedding. `preempted_state`: rows saved at a preemption or cached with the
    same prompt, used instead of the adapter, which acts from position `start` on. `places`: the cached blocks that it
    begins with, of `num_cached` tokens. The first `borrowed` of these are read in place, and must stay until `release`;
    the rest is copied.
    """

    slot: int
    token_ids: list[int]
    conditioning_length: int
    adapter: Adapter | None = None
    preempted_state: PreemptedState | None = None
    prompt_logprobs: int | None = None
    pooling: str | None = None
    start: int = 0
    places: tuple[int, ...] = ()
    num_cached: int = 0
    borrowed: int = 0


@dataclass(frozen=True)
class DecodeRow:
    """The last token of the sequence in `slot`, or one that may follow it, at `position`."""

    slot: int
    token_id: int
    position: int


@dataclass
class _PackedPrefill:
    rows: list[PrefillRow]
    segments: list[Segment] = field(default_factory=list)
    generating: list[GeneratorBatch] = field(default_factory=list)
    state: Any = None  # the executor's


class Runner:
    """A model, its KV cache and the modulation of its slots. A prefill may be in progress between decode steps, and may
    be paused for another: `advance`, `end` and `abandon` act on the one that began last.

    `kernel`: "native" is the compiled CPU kernel, "torch" the model's own modules, "auto" native if possible.
    `threads`: at most, for the native kernel; None: all available cores. `weights`: format of the backbone's weights in
    the native kernel, of `panels.WEIGHTS`. `draft_rows`: rows of a step beside one per slot. `capture`: whether steps
    on a GPU may be captured as graphs. Raises BackboneError or ConfigError if any of these is impossible.
    """

    def __init__(  # noqa: PLR0913 - as EngineConfig.runner_options() gives them
        self,
        model: PreTrainedModel,
        slots: int,
        length: int,
        kernel: str = "auto",
        threads: int | None = None,
        weights: str = "float32",
        draft_rows: int = 0,
        capture: bool = True,
        kv_budget: KVBudget = KVBudget(),  # noqa: B008 - it is frozen
    ) -> None:
        self.architecture = describe(model)
        refuse_unfit(model)
        config, weight = config_of(model), next(model.parameters())
        self.device = weight.device
        heads = config.num_attention_heads
        graphs = capture and uses_graphs(self.device)
        paged = find_paged_attention(weight.dtype) if graphs and not softcapped(model) else None
        pages = graphs or self.device.type == "cuda"  # memory is allocated at the start
        form: type[KVCache | PagedKVCache] = PagedKVCache if pages else KVCache
        cache = form(
            config.num_hidden_layers,
            slots,
            getattr(config, "num_key_value_heads", None) or heads,
            length,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            weight.dtype,
            self.device,
        )
        self.cache: SlotCache = cache
        if pages:  # before anything refers to the tensors
            self._limit(kv_budget)
        misfit = "kernel: torch was asked for" if kernel == "torch" else native_model.misfit(model)
        fits = not misfit
        if kernel == "native" and not fits:
            raise BackboneError(
                "engine.kernel: the native kernel needs a C compiler, a CPU, float32 and a backbone of type "
                f"{', '.join(native_model.MODELS)}; use kernel: auto"
            )
        if weights != "float32" and not fits:
            raise BackboneError(
                f"engine.weights: {weights} needs the native kernel, which cannot run here: {misfit}; "
                "use weights: float32"
            )
        if draft_rows and graphs:
            raise BackboneError(
                "engine.speculate: ngram needs a CPU: captured decode steps have one token per sequence; use off"
            )
        self.kernel = "native" if fits else "torch"
        self._weights = weights
        self.simd_width = native_model.simd_width() if fits else 1
        widths = [
            {
                **{name: site.width for name, site in layer.sites.items()},
                "o": self.architecture.hidden_size,
                "down": self.architecture.hidden_size,
            }
            for layer in self.architecture.layers
        ]
        self.modulation = Modulation(widths, slots + graphs, self.device, self.simd_width)
        self._executor: ModelExecutor
        if fits:
            assert isinstance(cache, KVCache), "the CPU kernel does not support pages"
            threads = threads or granted_threads()
            self._executor = NativeModel(
                model, self.architecture, cache, self.modulation, slots, threads, weights, draft_rows
            )
        else:
            recorder = GraphCapture() if graphs else None
            self._executor = TorchModel(model, self.architecture, cache, self.modulation, recorder, paged)
        if not pages:  # once all weights are loaded
            self._limit(kv_budget)
        self._prefills: list[_PackedPrefill] = []
        self._blocks: KVBlocks | None = None

    def _limit(self, budget: KVBudget) -> None:
        """Size the cache by the budget. Raises ConfigError if that is less than was requested."""
        blocks = self._allowed_blocks(budget)
        check_whole(self.cache, blocks, budget)
        self.cache.limit(blocks)

    def _allowed_blocks(self, budget: KVBudget) -> int:
        return allowed_blocks(self.cache, budget)

    @property
    def lost(self) -> PedroError | None:
        """Why the runner can no longer run; None while it can."""
        return None

    def on_lost(self, call: Callable[[], None]) -> None:
        """Call `call` when that happens, from any thread."""

    def read_adapter(self, directory: Path, backbone_digest: str) -> Adapter:
        """Load the adapter in `directory` for prefills. From any thread. Raises AdapterError if it cannot be served."""
        return read_adapter(directory, self.architecture, backbone_digest, self.device, self.simd_width)

    @torch.inference_mode()
    def begin(self, rows: list[PrefillRow]) -> None:
        """Start a prefill; `advance` runs it."""
        prefill = _PackedPrefill(rows)
        self._prefills.append(prefill)
        segments, start = prefill.segments, 0
        for row in rows:
            in_place = row.borrowed // BLOCK
            self._borrow(row.slot, row.places[:in_place])
            self._use(row.slot, len(row.token_ids))
            segments.append(Segment(start, start + len(row.token_ids) - row.num_cached, row.slot))
            if row.places[in_place:]:
                assert self._blocks is not None, "cached blocks need a cache"
                self._blocks.load(row.slot, row.places[in_place:])
            start = segments[-1].stop
        conditioned = [
            ConditionedRow(
                segment,
                row.conditioning_length,
                row.adapter,
                row.preempted_state,
                row.num_cached,
                row.start,
                every_state=row.prompt_logprobs is not None or row.pooling == "mean",
            )
            for row, segment in zip(rows, segments, strict=True)
        ]
        prefill.generating = self.modulation.begin(conditioned)
        prefill.state = self._executor.start(conditioned, [row.token_ids[row.num_cached :] for row in rows])

    @torch.inference_mode()
    def advance(self, until: int | None = None) -> None:
        """Continue the prefill until at least `until` tokens' worth of work, through all layers, is done (None:
        all)."""
        prefill = self._prefills[-1]
        self.modulation.generating = prefill.generating
        self._executor.advance(prefill.state, prefill.segments[-1].stop if until is None else until)

    def stats(self) -> dict[str, Any]:
        """The kernel, format and bytes of the weights, and sizes of the KV cache."""
        return {
            "kernel": self.kernel,
            "weights": self._weights,
            "weight_bytes": self._executor.weight_bytes,
            "kv_cache_bytes": self.cache.nbytes,
            "kv_blocks": self.cache.blocks,
            "kv_block_tokens": self.cache.block,
        }

    @property
    def splits_prefills(self) -> bool:
        """Whether a prefill can be split, and a call's duration is its cost."""
        return self.device.type == "cpu" and not self._executor.whole

    @torch.inference_mode()
    def embeddings(self) -> list[bytes | None]:
        """Embeddings of the prompts of a completed prefill, before `end`: [D] in float32, of length 1, where
        requested."""
        prefill = self._prefills[-1]
        pairs = zip(prefill.rows, prefill.segments, strict=True)
        return [None if row.pooling is None else self._embedding(prefill.state, segment, row) for row, segment in pairs]

    @torch.inference_mode()
    def end(self) -> tuple[Logits, list[list[Logprob | None] | None]]:
        """The logits after each prompt, and the prompts' own log-probabilities where requested.

        If it raises, the prefill is still in progress.
        """
        prefill = self._prefills[-1]
        logprobs = [
            None if row.prompt_logprobs is None else self._prompt_logprobs(prefill.state, segment, row)
            for row, segment in zip(prefill.rows, prefill.segments, strict=True)
        ]
        logits = self._executor.logits(prefill.state, [segment.stop - 1 for segment in prefill.segments])
        self._prefills.pop()
        return logits, logprobs

    def abandon(self) -> None:
        """Drop the prefill in progress and zero its slots, which may contain anything."""
        for row in self._prefills.pop().rows:
            Runner.wipe(self, row.slot, len(row.token_ids))

    @torch.inference_mode()
    def decode(self, rows: list[DecodeRow]) -> Logits:
        """One step for every row: the logits of the next token, in the order of `rows`."""
        for row in rows:
            self._use(row.slot, row.position + 1)
        return self._executor.decode(
            [row.slot for row in rows], [row.token_id for row in rows], [row.position for row in rows]
        )

    @torch.inference_mode()
    def copy(self, source: int, targets: list[int], length: int, places: Sequence[int] = ()) -> None:
        """Give the slots `targets` the first `length` positions of `source`, and its modulation. They borrow the blocks
        at `places`, which hold the first of these, at least those that `source` borrows."""
        for target in targets:
            self._borrow(target, places)
            self._use(target, length)
        borrowed = self.cache.borrowed
        self.cache.spread(source, targets, length - borrowed[source], borrowed[targets[0]] - borrowed[source])
        self.modulation.copy(source, targets)

    @torch.inference_mode()
    def reorder(self, pairs: list[tuple[int, int]], start: int, stop: int) -> None:
        """Simultaneously for each (a, b): slot b takes positions [start, stop) of slot a. All borrow the same."""
        if pairs:
            before = self.cache.borrowed[pairs[0][0]]
            self.cache.move([a for a, _ in pairs], [b for _, b in pairs], start - before, stop - before)

    @torch.inference_mode()
    def save_state(self, slot: int) -> PreemptedState:
        """What a preempted sequence in `slot` needs to resume, copied."""
        return self.modulation.save_state(slot)

    @torch.inference_mode()
    def slot_rows(self, slot: int) -> SlotRows:
        """The slot's modulation, copied."""
        return self.modulation.save_state(slot).rows

    def make_blocks(self, count: int) -> KVBlocks:
        """Allocate storage for the blocks that `PrefillRow.places` refers to."""
        self._blocks = KVBlocks(self.cache, count, self._executor if isinstance(self._executor, NativeModel) else None)
        return self._blocks

    def save_blocks(self, slot: int, first: int, places: Sequence[int]) -> None:
        """Keep the slot's own blocks from number `first` on at `places`."""
        assert self._blocks is not None, "allocated by make_blocks"
        self._blocks.save(slot, first, places)

    def wipe(self, slot: int, length: int | None = None, start: int = 0) -> None:
        """As `KVCache.wipe`, of a sequence's positions; what it borrows is left alone."""
        before = self.cache.borrowed[slot]
        self.cache.wipe(slot, None if length is None else max(0, length - before), max(0, start - before))

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """The sequence in `slot` ended or was preempted: its contents are no longer needed."""
        self.modulation.release(slot)
        self.cache.lengths[slot] = 0
        self._borrow(slot, ())

    def close(self) -> None:
        """Release the model."""
        if isinstance(self._executor, TorchModel):
            self._executor.close()

    def _borrow(self, slot: int, places: Sequence[int]) -> None:
        """Have the slot's sequence begin with the blocks at `places`."""
        if places or self.cache.borrowed[slot]:
            assert self._blocks is not None, "cached blocks need a cache"
            self._blocks.borrow(slot, places)

    def _use(self, slot: int, length: int) -> None:
        """The slot's sequence is about to have `length` positions."""
        own = self.cache.lengths[slot] = length - self.cache.borrowed[slot]
        if own > self.cache.room[slot]:
            self.cache.grow(slot)

    def _prompt_logprobs(self, state: Any, segment: Segment, row: PrefillRow) -> list[Logprob | None]:
        """The log-probability of each prompt token given those before it; the first has none."""
        result: list[Logprob | None] = [None]
        for start in range(0, len(row.token_ids) - 1, HEAD_CHUNK):
            stop = min(start + HEAD_CHUNK, len(row.token_ids) - 1)
            logits = self._executor.logits(state, list(range(segment.start + start, segment.start + stop)))
            result += token_logprobs(logits.values, row.token_ids[start + 1 : stop + 1], row.prompt_logprobs or 0)
        return result

    def _embedding(self, state: Any, segment: Segment, row: PrefillRow) -> bytes:
        """The hidden state after the model's last norm: of the prompt's last token, or the mean over all."""
        first = segment.stop - 1 if row.pooling == "last" else segment.start
        assert row.pooling == "last" or not row.num_cached, "a mean needs the state of every token"
        pooled: Any = 0.0
        for start in range(first, segment.stop, HEAD_CHUNK):
            index = list(range(start, min(start + HEAD_CHUNK, segment.stop)))
            pooled = pooled + self._executor.hidden(state, index).float().sum(0)
        made: torch.Tensor = F.normalize(pooled / (segment.stop - first), dim=0)
        return struct.pack(f"<{len(made)}f", *made.tolist())
