"""A Llama-like model on the CPU kernel: weights are packed once; a call runs one layer of a prefill or one decode step.

Takes ownership of the model: its weights are freed as they are packed, so only one copy exists.
Legend: N tokens of a packed batch, B rows, D model width, W output width, K inputs, P panels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import POINTER, addressof, c_int, c_void_p, cast, pointer
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F

from pedro.adapter_kinds import SITES, Adapter, Generator
from pedro.engine import native
from pedro.engine.huge_pages import HugeMemory
from pedro.engine.kernel_threads import KernelThreads
from pedro.engine.model_executor import Logits
from pedro.engine.module_weights import norm_factor, own_weights, release, rotations, weights_of, window
from pedro.engine.panels import WEIGHTS, PanelPacker
from pedro.methods.architectures import config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.engine.kv_cache import KVCache
    from pedro.engine.modulation import ConditionedRow, Modulation
    from pedro.methods.architectures import Architecture, LayerSites
    from pedro.model_protocols import ModelConfig

HEAD_WEIGHTS = {"int4": "int8"}  # of head and embedding, if different from the layers'
MODELS = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
GENERATOR_ACTIVATIONS = ("rational", "gelu", "relu")  # the order of native.c's enums
PART_ROWS, PART_STEP = 512, 64  # rows per layer call: the maximum, and the multiple
POOLS = ("last", "mean", "max")
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}


def supported(model: PreTrainedModel) -> bool:
    """Whether the kernel is available and can run this model."""
    return not misfit(model)


def misfit(model: PreTrainedModel) -> str:
    """Why the kernel cannot run this model; empty if it can."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"the native kernel runs on a CPU from float32 weights, not on {weight.device.type} from {dtype}"
    return unfit(config_of(model))


def unfit(config: ModelConfig) -> str:
    """Why the kernel cannot run models with this config here, on a CPU in float32; empty if it can."""
    if config.model_type not in MODELS:
        return f"the native kernel runs {', '.join(MODELS)}, not {config.model_type}"
    if config.hidden_act not in ACTIVATIONS:
        return f"the native kernel does not support {config.hidden_act}"
    return (
        "" if native.load_kernel() is not None else "the native kernel could not be built here; it needs a C compiler"
    )


def simd_width() -> int:
    """The number of float32 in the kernel's vectors; modulation rows are padded to it."""
    kernel = native.load_kernel()
    assert kernel is not None, "asked for only where it is supported"
    return int(kernel.pedro_simd_width())


class PrefillState:
    """A prefill in progress: its rows and their hidden states. `done` counts tokens times layers. The last layer
    computes the outputs of the tokens `asked` only."""

    def __init__(self, rows: list[ConditionedRow], batch: native.BatchStruct, buffers: dict[str, torch.Tensor]) -> None:
        self.rows = rows  # keeps alive the adapters whose weights the kernel reads
        spans = [(row.segment.start if row.every_state else row.segment.stop - 1, row.segment.stop) for row in rows]
        self.asked = torch.cat([torch.arange(*span, dtype=torch.int32) for span in spans])
        self.batch = batch
        self.buffers = buffers
        self.generators: Any = None
        self.done = 0


class NativeModel:
    """The executor of `Runner` on the CPU kernel."""

    whole = False

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        cache: KVCache,
        modulation: Modulation,
        slots: int,
        threads: int,
        weights: str = "float32",
        draft_rows: int = 0,
    ) -> None:
        kernel = native.load_kernel()
        assert kernel is not None, "asked for only where it is supported"
        config = config_of(model)
        self._num_layers = len(architecture.layers)
        self._kernel, self._modulation, self._cache = kernel, modulation, cache
        self.threads = KernelThreads(threads)
        self._packer = PanelPacker(simd_width())
        self._weights, head_weights = weights, HEAD_WEIGHTS.get(weights, weights)
        self._memory = HugeMemory()
        self._held: list[torch.Tensor] = []  # tensors whose addresses the kernel has
        heads = config.num_attention_heads
        kv_heads, width = cache.keys[0].shape[1], cache.keys[0].shape[3]
        layers = (native.LayerStruct * self._num_layers)()
        decoder: Any = model.base_model
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        cos, sin = rotations(decoder, cache.keys[0].shape[2])
        self._sizes: dict[str, int] = {
            "dim": config.hidden_size,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": width,
            "ffn": config.intermediate_size,
            "vocab": embedding.num_embeddings,
        }
        self._widths = self._packer.buffer_widths(self._sizes)
        self._final_norm = norm_factor(decoder.norm).detach().float().contiguous()
        tied = head.weight.data_ptr() == embedding.weight.data_ptr()
        self.struct = native.ModelStruct(
            **self._sizes,
            layers=self._num_layers,
            rotary=cos.shape[1],
            length=cache.keys[0].shape[2],
            slots=slots,
            threads=threads,
            activation=ACTIVATIONS[config.hidden_act],
            weights=WEIGHTS.index(weights),
            head_weights=WEIGHTS.index(head_weights),
            eps=config.rms_norm_eps,
            scaling=architecture.layers[0].attention.scaling,
            embed_scale=float(getattr(embedding, "embed_scale", 1.0)),
            embed=None if tied else self._hold(self._table(embedding.weight.data, head_weights), copied=False),
            final_norm=self._final_norm.data_ptr(),
            head=self._hold(self._packer.panels([head.weight.data], head_weights)),
            cos=self._hold(cos),
            sin=self._hold(sin),
            layer=layers,
        )
        release(head)
        if tied or head_weights != "float32":
            release(embedding)
        self._structs: WeakKeyDictionary[Generator, Any] = WeakKeyDictionary()
        for layer, sites, keys, values in zip(layers, architecture.layers, cache.keys, cache.values, strict=True):
            self._pack(layer, sites, keys, values)
        self.weight_bytes = sum(tensor.nbytes for tensor in self._held)  # includes rotary tables
        self._lora = torch.zeros(self._num_layers, len(SITES), slots, 2, dtype=torch.int64)
        self._ranks = torch.zeros(self._num_layers, len(SITES), slots, dtype=torch.int32)
        self.struct.lora, self.struct.ranks = self._lora.data_ptr(), self._ranks.data_ptr()
        most = slots + draft_rows  # rows of a step
        self._batch, self._buffers = self._make_batch(most, self._memory.empty)
        self._part, self._part_buffers = self._make_batch(PART_ROWS, self._memory.empty, logits=False)
        self._prompts: tuple[native.BatchStruct, dict[str, torch.Tensor]] | None = None
        self._borrower: Callable[[], PrefillState | None] = lambda: None  # the prefill that uses the shared buffers
        ids, positions, slot_ids, mods = (self._buffers[name] for name in ("ids", "positions", "slots", "mods"))
        self._inputs: list[Any] = [(c_int * most).from_address(t.data_ptr()) for t in (ids, positions, slot_ids, mods)]
        modulation.on_buffer = self._use_buffer
        modulation.on_low_rank = self._use_low_rank

    def start(self, rows: list[ConditionedRow], token_ids: list[list[int]]) -> PrefillState:
        """Start a prefill of these rows."""
        flat = [token for ids in token_ids for token in ids]
        batch, buffers = self._prefill_batch(len(flat))
        columns = {
            "ids": flat,
            "positions": [
                p for row, ids in zip(rows, token_ids, strict=True) for p in range(row.begin, row.begin + len(ids))
            ],
            "slots": [row.segment.slot for row, ids in zip(rows, token_ids, strict=True) for _ in ids],
            "mods": [mod for row in rows for mod in row.slots_by_token],
        }
        for name, values in columns.items():
            buffers[name][: len(flat)] = torch.tensor(values, dtype=torch.int32)
        buffers["starts"] = torch.tensor([*(row.segment.start for row in rows), len(flat)], dtype=torch.int32)
        conditioned = [row.conditioning_length - row.begin for row in rows]
        buffers["conditioned"] = torch.tensor(conditioned, dtype=torch.int32)
        batch.prompts, batch.starts = len(rows), buffers["starts"].data_ptr()
        batch.conditioned = buffers["conditioned"].data_ptr()
        batch.lora = any(row.modulated and row.segment.slot in self._modulation.low_rank for row in rows)
        state = PrefillState(rows, batch, buffers)
        if self._borrower() is None:
            self._borrower = ref(state)
        if any(row.adapter is not None and row.adapter.generator is not None for row in rows):
            state.generators = (c_void_p * len(rows))(*(self._generators(row.adapter) for row in rows))
            batch.generators = cast(state.generators, c_void_p)
        self._run("embed", batch)
        return state

    def advance(self, state: PrefillState, until: int) -> None:
        """Continue, layer by layer and a few rows at a time, until `until` tokens' worth of it is done."""
        count = int(state.batch.rows)
        while (left := min(until, count) * self._num_layers - state.done) > 0:
            layer, row = divmod(state.done, count)
            if row == 0 and state.generators is not None:
                self._run("generate", state.batch, layer)
            size = min(count - row, PART_ROWS, -(-left // PART_STEP) * PART_STEP)
            self._run("prefill", self._part_of(state, row, size, layer == self._num_layers - 1), layer)
            state.done += size
            if row + size == count:
                self._modulation.edit(layer, state.buffers["x"][:count, : self._sizes["dim"]], state.rows)

    def logits(self, state: PrefillState, index: list[int]) -> Logits:
        """The logits after tokens `index` of a prefill whose layers all ran."""
        batch, buffers = self._make_batch(len(index), torch.empty)
        buffers["x"].copy_(state.buffers["x"][torch.tensor(index)])
        self._run("logits", batch)
        return Logits(buffers["logits"], batch.best[: len(index)])

    def hidden(self, state: PrefillState, index: list[int]) -> torch.Tensor:
        """The normed hidden states [n, D] of the tokens `index` of a prefill whose layers all ran."""
        x = state.buffers["x"][torch.tensor(index), : self._sizes["dim"]]
        return F.rms_norm(x, x.shape[-1:], self._final_norm, self.struct.eps)

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Logits:
        """One step: the last token of each row. Among rows of one slot, each sees those at lower positions."""
        rows, batch, modulation = len(slots), self._batch, self._modulation
        ids, at, slot_ids, mods = self._inputs
        ids[:rows], at[:rows], slot_ids[:rows] = token_ids, positions, slots
        mods[:rows] = [slot if modulation.modulated[slot] else -1 for slot in slots]
        batch.rows, batch.shared = rows, len(set(slots)) < rows
        batch.lora = bool(modulation.low_rank) and any(slot in modulation.low_rank for slot in slots)
        if batch.lora:
            self._make_low(batch, self._buffers)
        self._run("decode", batch)
        return Logits(self._buffers["logits"][:rows], batch.best[:rows])

    def _run(self, call: str, batch: native.BatchStruct, *layer: int) -> None:
        """One call of the kernel, with as many threads as the machine lets run."""
        self.struct.threads = self.threads.count
        getattr(self._kernel, f"pedro_{call}")(pointer(self.struct), pointer(batch), *layer)
        self.threads.note(self.struct.spent, self.struct.lost)

    def _part_of(self, state: PrefillState, row: int, size: int, last: bool) -> native.BatchStruct:
        """Rows [row, row + size) of the prefill as a batch: its hidden states, and scratch buffers that all parts
        share. `last`: of the last layer."""
        part, buffers = self._part, state.buffers
        part.rows, part.lora = size, state.batch.lora
        for name in ("x", "ids", "positions", "slots", "mods"):
            setattr(part, name, buffers[name][row:].data_ptr())
        spans = [(max(r.segment.start, row), min(r.segment.stop, row + size)) for r in state.rows]
        starts = [start - row for start, stop in spans if start < stop]
        self._part_buffers["starts"] = torch.tensor([*starts, size], dtype=torch.int32)
        part.prompts, part.starts = len(starts), self._part_buffers["starts"].data_ptr()
        part.asked = -1
        if last:
            asked = self._part_buffers["asked"] = state.asked[(state.asked >= row) & (state.asked < row + size)] - row
            part.asked, part.asked_rows = len(asked), asked.data_ptr()
        self._make_low(part, self._part_buffers)
        return part

    def _generators(self, adapter: Adapter | None) -> int | None:
        """Addresses of the adapter's generators for the kernel, one per layer; None if it has none."""
        generator = None if adapter is None else adapter.generator
        if generator is None:
            return None
        known = self._structs.get(generator)
        if known is None:
            known = self._structs[generator] = (native.GeneratorStruct * self._num_layers)()
            for struct, part, widths in zip(known, generator.layers, generator.widths, strict=True):
                for name in ("down", "up", "bias", "a", "b"):
                    tensor = getattr(part, name)
                    setattr(struct, name, None if tensor is None else tensor.data_ptr())
                struct.rank, struct.width = part.down.shape[1], sum(widths)
                struct.above, struct.below = (0 if t is None else len(t) for t in (part.a, part.b))
                struct.activation = GENERATOR_ACTIVATIONS.index(part.activation)
                struct.pool, struct.residual = POOLS.index(generator.pool), generator.pool_source == "residual"
                struct.window = generator.window or 0
                struct.sites = len(generator.targets)
                struct.site[: struct.sites] = [SITES.index(site) for site in generator.targets]
        return addressof(known)

    def _pack(self, layer: native.LayerStruct, block: LayerSites, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Point `layer` at packed weights and free the modules' own."""
        attention, mlp_norm = block.attention, block.block.get_submodule("post_attention_layernorm")
        sites = {name: weights_of(site) for name, site in block.sites.items()}
        sites |= {"o": own_weights(block.output), "down": own_weights(block.down)}
        packer, weights = self._packer, self._weights
        layer.norm1, layer.norm2 = self._hold(norm_factor(block.norm)), self._hold(norm_factor(mlp_norm))
        for name in ("q_norm", "k_norm"):
            norm = getattr(attention, name, None)
            setattr(layer, name, None if norm is None else self._hold(norm_factor(norm)))
        layer.qkv = self._hold(packer.panels([sites[site][0] for site in "qkv"], weights))
        layer.o = self._hold(packer.panels([sites["o"][0]], weights))
        layer.gate_up = self._hold(packer.paired(sites["gate"][0], sites["up"][0], weights))
        layer.down = self._hold(packer.panels([sites["down"][0]], weights))
        for number, site in enumerate(SITES):
            bias = sites[site][1]
            if bias is not None:
                layer.bias[number] = self._hold(packer.widened(bias[:, None])[:, 0])
        layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        layer.window = window(attention)
        for module in {
            id(m): m for m in (*(s.module for s in block.sites.values()), block.output, block.down)
        }.values():
            release(module)

    def _table(self, embedding: torch.Tensor, weights: str) -> torch.Tensor:
        """An embedding [V, D] not tied to the head: unchanged, or quantised in panels."""
        return embedding if weights == "float32" else self._packer.panels([embedding], weights)

    def _hold(self, tensor: torch.Tensor, copied: bool = True) -> int:
        """Keep the tensor alive, as float32 unless it contains bytes; returns its address. `copied`: in huge pages."""
        tensor = tensor.detach()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        self._held.append(self._memory.copy(tensor) if copied else tensor.contiguous())
        return self._held[-1].data_ptr()

    def _make_batch(
        self, rows: int, empty: Callable[[int, int], torch.Tensor], logits: bool = True
    ) -> tuple[native.BatchStruct, dict[str, torch.Tensor]]:
        """A batch of `rows`, and the tensors behind it: `dim` and so on are the widths of native.c's `Batch`."""
        threads = self.threads.limit
        widths = {**self._widths, "best_value": threads}
        if logits:
            widths["logits"] = self._sizes["vocab"]
        buffers = {name: empty(rows, width) for name, width in widths.items()}
        buffers |= {
            name: torch.empty(rows, dtype=torch.int32) for name in ("ids", "positions", "slots", "mods", "best")
        }
        buffers["best_at"] = torch.empty(rows * threads, dtype=torch.int32)
        batch = native.BatchStruct(rows=rows, lora=0)
        for name, buffer in buffers.items():
            address = buffer.data_ptr()
            setattr(batch, name, cast(address, POINTER(c_int)) if name == "best" else address)
        return batch, buffers

    def _prefill_batch(self, rows: int) -> tuple[native.BatchStruct, dict[str, torch.Tensor]]:
        """Growing buffers for inputs and hidden states, reused by consecutive prefills. A prefill that begins while
        another is paused gets its own."""
        shared = self._borrower() is None
        if not shared or self._prompts is None or len(self._prompts[1]["ids"]) < rows:
            buffers = {"x": torch.empty(rows, self._widths["x"])}
            buffers |= {name: torch.empty(rows, dtype=torch.int32) for name in ("ids", "positions", "slots", "mods")}
            made = native.BatchStruct(**{name: buffer.data_ptr() for name, buffer in buffers.items()}), buffers
            if not shared:
                made[0].rows = rows
                return made
            self._prompts = made
        batch, buffers = self._prompts
        batch.rows = rows
        return batch, buffers

    def _make_low(self, batch: native.BatchStruct, buffers: dict[str, torch.Tensor]) -> None:
        """Room for the low-rank terms of every row; it grows with the largest rank."""
        if batch.lora and ("low" not in buffers or buffers["low"].shape[1] < 3 * self.struct.max_rank):
            buffers["low"] = torch.zeros(len(buffers["x"]), 3 * self.struct.max_rank)
            batch.low = buffers["low"].data_ptr()

    def _use_buffer(self, kind: str, layer: int, site: str, buffer: torch.Tensor) -> None:
        getattr(self.struct.layer[layer], kind)[SITES.index(site)] = buffer.data_ptr()

    def _use_low_rank(self, slot: int, adapter: Adapter | None) -> None:
        self._ranks[:, :, slot] = 0
        for layer, terms in enumerate(adapter.low_rank if adapter is not None else ()):
            for site, term in terms.items():
                number, rank = SITES.index(site), term.a.shape[1]
                self._ranks[layer, number, slot] = rank
                self._lora[layer, number, slot, 0] = term.a.data_ptr()
                self._lora[layer, number, slot, 1] = term.b.data_ptr()
                self.struct.max_rank = max(self.struct.max_rank, rank)
