"""Runs a transformers model through its own modules, on any device.

Models whose layers have Llama's signature are run layer by layer, so that a prefill can be split between layers; all
others run through their own `forward` at once, behind the same interface.
Legend: N tokens of the packed batch, B rows, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pedro.engine import attention
from pedro.engine.attention import DecodeStep, PrefillStep
from pedro.engine.graphs import Capture, GraphedDecoder, PagedAttention, StaticStep
from pedro.engine.hooks import Hooks
from pedro.engine.kv_cache import PagedKVCache
from pedro.engine.model_executor import Logits
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.engine.kv_cache import SlotCache
    from pedro.engine.modulation import ConditionedRow, Modulation
    from pedro.methods.architectures import Architecture

log = logging.getLogger(__name__)
DRIVEN = ("llama", "mistral", "phi3", "qwen2", "qwen3")


@dataclass
class ForwardState:
    """A forward pass in progress: the input of the next layer. `layer` is the next one to run."""

    ids: torch.Tensor  # [1, N]
    positions: torch.Tensor  # [1, N]
    hidden: torch.Tensor | None = None  # [1, N, D]
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    layer: int = 0
    rows: list[ConditionedRow] = field(default_factory=list)
    step: PrefillStep | None = None


class TorchModel:
    """The executor of `Runner` on any device and architecture."""

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        cache: SlotCache,
        modulation: Modulation,
        capture: Capture | None = None,
        paged: PagedAttention | None = None,
    ) -> None:
        self._trunk = make_trunk(model)
        self.whole = self._trunk.num_parts == 1
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self._head = OutputHead(model)
        self._cache = cache
        self._hooks = Hooks(architecture, modulation)
        self._modulation = modulation
        self._device = next(model.parameters()).device
        self._graphs = None
        if capture is not None:
            assert isinstance(cache, PagedKVCache), "captured steps find their blocks through a table"

            def version() -> tuple[int, int]:
                return len(modulation.buffers), self._hooks.version

            self._graphs = GraphedDecoder(cache, self._run_static, version, paged, self._device, capture)

    def start(self, rows: list[ConditionedRow], token_ids: list[list[int]]) -> ForwardState:
        """Start a prefill of these rows."""
        flat = torch.tensor([[token for ids in token_ids for token in ids]], device=self._device)
        places = [row.begin + at for row, ids in zip(rows, token_ids, strict=True) for at in range(len(ids))]
        step = PrefillStep(self._cache, [row.segment for row in rows], [row.begin for row in rows])
        return ForwardState(flat, torch.tensor([places], device=self._device), rows=rows, step=step)

    def advance(self, state: ForwardState, until: int) -> None:
        """Run whole layers until at least `until` tokens' worth of the prefill is done."""
        count = state.ids.shape[1]
        last = -(-min(until, count) * self._trunk.num_parts // count)
        if last > state.layer:
            with self._hooks.prefilling(state.rows):
                self._trunk.advance(state, state.step, last)

    def logits(self, state: ForwardState, index: list[int]) -> Logits:
        """The logits after tokens `index` of a prefill whose layers all ran."""
        return Logits(self._head(self.hidden(state, index)))

    def hidden(self, state: ForwardState, index: list[int]) -> torch.Tensor:
        """The normed hidden states [n, D] of the tokens `index` of a prefill whose layers all ran."""
        return self._trunk.finish(state)[torch.tensor(index, device=self._device)]

    def decode(self, slots: list[int], token_ids: list[int], positions: list[int]) -> Logits:
        """One step: the last token of each row."""
        modulated = any(self._modulation.modulated[slot] for slot in slots)
        if self._graphs is not None:
            try:
                return self._graphs.decode(slots, token_ids, positions, modulated)
            except RuntimeError:  # a model that cannot be captured decodes without graphs
                log.warning("decode steps of this backbone cannot be captured as CUDA graphs", exc_info=True)
                self._graphs = None
        order = sorted(range(len(slots)), key=slots.__getitem__)
        ids = torch.tensor([[token_ids[i] for i in order]], device=self._device)
        step = DecodeStep(self._cache, [slots[i] for i in order], [positions[i] for i in order], self._device)
        state = ForwardState(ids, step.positions[None])
        with self._hooks.decoding(step, modulated):
            self._trunk.advance(state, step, self._trunk.num_parts)
        logits = self._head(self._trunk.finish(state))
        if order == list(range(len(order))):
            return Logits(logits)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return Logits(logits[back.to(self._device)])

    def _run_static(self, step: StaticStep, modulated: bool) -> torch.Tensor:
        state = ForwardState(step.ids, step.positions[None])
        with self._hooks.decoding(step, modulated):
            self._trunk.advance(state, step, self._trunk.num_parts)
        return self._head(self._trunk.finish(state))

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._hooks.remove()


class LayerTrunk:
    """Runs embedding → layers → norm of a Llama-like model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._base: Any = model.base_model
        self._layers = cast("nn.ModuleList", self._base.layers)
        self.num_parts = len(self._layers)

    def advance(self, state: ForwardState, step: Any, last: int) -> None:
        """Run the layers up to `last`."""
        if state.layer == 0:
            state.hidden = self._base.embed_tokens(state.ids)
            state.rotary = self._base.rotary_emb(state.hidden, position_ids=state.positions)
        with attention.attending(step):
            for layer in self._layers[state.layer : last]:
                state.hidden = layer(
                    state.hidden,
                    attention_mask=None,
                    position_ids=state.positions,
                    past_key_values=step,
                    use_cache=True,
                    position_embeddings=state.rotary,
                )
        state.layer = last

    def finish(self, state: ForwardState) -> torch.Tensor:
        """The normed hidden states, [N, D], once all layers ran."""
        hidden: torch.Tensor = self._base.norm(state.hidden)[0]
        return hidden


class WholeTrunk:
    """Runs the model's own forward at once."""

    num_parts = 1

    def __init__(self, model: PreTrainedModel) -> None:
        self._base: Any = model.base_model

    def advance(self, state: ForwardState, step: Any, last: int) -> None:
        """Run everything."""
        with attention.attending(step):
            result = self._base(
                input_ids=state.ids,
                position_ids=state.positions,
                past_key_values=step,
                use_cache=True,
                return_dict=True,
            )
        state.hidden, state.layer = result.last_hidden_state, last

    def finish(self, state: ForwardState) -> torch.Tensor:
        """The normed hidden states, [N, D]."""
        assert state.hidden is not None, "the model ran"
        return state.hidden[0]


class OutputHead:
    """Hidden states to logits, as the model's own causal-LM class computes them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._projection = model.get_output_embeddings()
        self._softcap = getattr(model.config, "final_logit_softcapping", None)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, D] → [n, V], float32."""
        logits: torch.Tensor = self._projection(hidden)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits.float()


def refuse_unfit(model: PreTrainedModel) -> None:
    """Raises BackboneError if rows of a batch would affect each other or the cache has an unsupported form."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise BackboneError(
            f"backbone: rope_type {', '.join(sorted(k for k in kinds if k))} makes a row depend on the longest row of "
            "its batch, which the engine refuses; set another rope_type in the backbone's config.json",
            param="backbone",
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise BackboneError("backbone: bidirectional attention cannot be decoded from a cache", param="backbone")


def softcapped(model: PreTrainedModel) -> bool:
    """Whether attention scores are soft-capped (Gemma 2), which fused attention kernels do not support."""
    return getattr(model.config, "attn_logit_softcapping", None) is not None


def make_trunk(model: PreTrainedModel) -> LayerTrunk | WholeTrunk:
    """The trunk for this model. It owns the model: only the engine may run it from here on."""
    attention.register()
    base: Any = model.base_model
    model.config._attn_implementation = attention.NAME
    base.config._attn_implementation = attention.NAME
    return (LayerTrunk if model.config.model_type in DRIVEN else WholeTrunk)(model)
