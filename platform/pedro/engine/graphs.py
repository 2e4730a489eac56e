"""Decode steps as CUDA graphs: one launch per step instead of hundreds.

A graph is captured for each number of rows (rounded up) when it is first needed. Its inputs are static tensors; unused
rows write to a spare slot of the cache. Attention is torch's paged `varlen_attn` if the installed torch has it, else
masked SDPA over a rounded-up length; a slot is a run of pages.
Legend: R rows of the graph, S slots, K key-value heads, H heads, T positions, d head width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pedro.engine.attention import masked_attention
from pedro.engine.model_executor import Logits

if TYPE_CHECKING:
    from pedro.engine.kv_cache import PagedKVCache

LENGTH_STEP = 256  # multiple to which masked attention rounds lengths up
MAX_GRAPHS = 64  # the least recently used is dropped
Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
PagedAttention = Callable[..., torch.Tensor]


def uses_graphs(device: torch.device) -> bool:
    """Whether decode steps on this device are captured."""
    return device.type == "cuda"


def find_paged_attention(dtype: torch.dtype) -> PagedAttention | None:
    """torch's variable-length attention over pages, if the installed torch has it and the dtype fits."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    fits = {"block_table", "seqused_k"} <= set(inspect.signature(varlen_attn).parameters)
    found: PagedAttention = varlen_attn  # type: ignore[assignment]  # a pair only with `return_aux`
    return found if fits and dtype in (torch.float16, torch.bfloat16) else None


class GraphCapture:
    """Records graphs that share one memory pool: they never run concurrently; only their outputs are separate."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """Record `run` after two warm-ups. Loader threads may use the device meanwhile."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = run()
        return graph.replay, made


class StaticStep:
    """A decode step with static shapes: it is passed where transformers expects a cache, and computes attention."""

    def __init__(
        self, cache: PagedKVCache, rows: int, length: int, paged: PagedAttention | None, device: torch.device
    ) -> None:
        self.rows = rows
        self.ids = torch.zeros(1, rows, dtype=torch.long, device=device)
        self.slots = torch.full((rows,), cache.spare, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self._cache, self._length, self._paged = cache, length, paged
        self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._places = self._tables = torch.empty(0)  # per row: where its token is written, and its pages

    def fill(self, slots: list[int], token_ids: list[int], positions: list[int]) -> list[int]:
        """Set the inputs; returns the row of each request. Without pages, row numbers are slot numbers."""
        rows = list(range(len(slots))) if self._paged is not None else slots
        columns = torch.tensor([[0] * self.rows, [self._cache.spare] * self.rows, [0] * self.rows])
        columns[:, rows] = torch.tensor([token_ids, slots, positions])
        for target, values in zip((self.ids[0], self.slots, self.positions), columns, strict=True):
            target.copy_(values, non_blocking=True)
        return rows

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values [1, K, R, d]; `attend` finds them by the layer of its module."""
        if layer == 0:
            self._places = self._cache.places(self.slots, self.positions)
            self._tables = self._cache.table[self.slots]
        self._cache.append_at(layer, self._places, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        if self._paged is not None:
            return keys, values
        return self._cache.read(layer, self.rows, self._length)

    def of_slots(self, buffer: torch.Tensor) -> torch.Tensor:
        """The rows [R, …] that belong to this step's slots, of a buffer [S, …]."""
        return buffer.index_select(0, self.slots)

    def get_seq_length(self, layer: int = 0) -> int:
        """What transformers asks of a cache; positions are always given, so that nothing depends on it."""
        return self._length - 1

    def attend(
        self,
        module: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Queries [1, H, R, d] → [1, R, H, d]."""
        _, heads, rows, width = queries.shape
        if self._paged is None:
            grouped = queries[0].transpose(0, 1).reshape(rows, keys.shape[1], -1, width)  # [R, K, G, d]
            at = torch.arange(self._length, device=queries.device)
            mask = at[None, :] <= self.positions[:, None]
            if window is not None:
                mask &= at[None, :] > self.positions[:, None] - window
            out = masked_attention(grouped, keys, values, mask[:, None, None, :], scaling, softcap)
            return out.reshape(1, rows, heads, width)
        paged_keys, paged_values = self._cache.keys[module.layer_idx], self._cache.values[module.layer_idx]
        out = self._paged(
            queries[0].transpose(0, 1).contiguous(),  # [R, H, d]
            paged_keys,
            paged_values,
            self._starts,
            None,
            1,
            self._cache.length,
            scale=scaling,
            window_size=(-1, 0) if window is None else (window - 1, 0),
            enable_gqa=heads != paged_keys.shape[2],
            seqused_k=(self.positions + 1).to(torch.int32),
            block_table=self._tables,
        )
        return out[None]


@dataclass
class _Graph:
    step: StaticStep
    replay: Replay
    logits: torch.Tensor  # [R, V + 1]: the logits, and the likeliest token or -1 where they are not finite


class GraphedDecoder:
    """Decodes by graphs. `run(step, modulated)` gives logits [R, V]; `version` changes when graphs must be captured
    again."""

    def __init__(
        self,
        cache: PagedKVCache,
        run: Callable[[StaticStep, bool], torch.Tensor],
        version: Callable[[], Hashable],
        paged: PagedAttention | None,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._cache, self._run, self._version = cache, run, version
        self._paged, self._device, self._capture = paged, device, capture
        self._graphs: dict[tuple[Any, ...], _Graph] = {}

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int], modulated: bool) -> Logits:
        """One step of every row."""
        rows = _round_up(len(slots) if self._paged is not None else max(slots) + 1, self._cache.spare)
        whole = self._cache.length
        length = whole if self._paged is not None else min(whole, -(-(max(positions) + 1) // LENGTH_STEP) * LENGTH_STEP)
        key = (rows, length, modulated, self._version())
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = self._make(rows, length, modulated)  # before dropping others, to keep their shared memory
            kept = [(k, g) for k, g in self._graphs.items() if k[-1] == key[-1]]
            self._graphs = dict(kept[-(MAX_GRAPHS - 1) :])
        self._graphs[key] = graph  # at the end: most recently used
        at = graph.step.fill(slots, token_ids, positions)
        graph.replay()
        made = graph.logits[torch.tensor(at, device=self._device)]
        return Logits(made[:, :-1], made[:, -1].long().tolist())

    def _make(self, rows: int, length: int, modulated: bool) -> _Graph:
        step = StaticStep(self._cache, rows, length, self._paged, self._device)

        def run() -> torch.Tensor:
            logits = self._run(step, modulated)
            best = torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
            return torch.cat([logits, best[:, None].to(logits.dtype)], 1)

        return _Graph(step, *self._capture(run))


def _round_up(rows: int, most: int) -> int:
    """The next power of two up to 8, then the next multiple of 8: few graphs, little padding."""
    size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    return min(size, most)
