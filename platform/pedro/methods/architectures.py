"""Where each supported backbone keeps its blocks, norms and projections. Holds for any adapter.

One table by `config.model_type`. A projection is *apart* (a module of its own) or *fused* (some of the outputs of a
shared module, named by a slice or, where heads interleave, by an index). "up" of an MLP without a gate is its first
projection. Supporting one more backbone is one more line of `LAYOUTS`, and its name in `backbone_files.MODEL_TYPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from pedro.errors import BackboneError

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

TARGETS = ("q", "k", "v", "gate", "up")
LINEARS = (*TARGETS, "o", "down")
Rows = slice | torch.Tensor | None
Cut = Callable[[Any], dict[str, Rows]]  # model config -> which outputs of a fused module belong to which target


class Site(NamedTuple):
    """Where one projection's output appears: `module(x)[..., rows]`, `width` wide; rows None means all of it."""

    module: nn.Module
    rows: Rows
    width: int


@dataclass(frozen=True)
class LayerSites:
    """The parts of one decoder block. `sites` maps q, k, v, gate (if there is one) and up to their modules."""

    name: str  # of the block, as in model.named_modules()
    block: nn.Module
    norm: nn.Module  # makes the attention input
    attention: nn.Module
    sites: dict[str, Site]
    output: nn.Module  # the attention's output projection
    down: nn.Module  # the MLP's output projection

    @property
    def linears(self) -> dict[str, Site]:
        """Every projection of the block: `sites`, and o and down, whose output is as wide as the model."""
        return {
            **self.sites,
            "o": Site(self.output, None, _width(self.output, None)),
            "down": Site(self.down, None, _width(self.down, None)),
        }


@dataclass(frozen=True)
class Architecture:
    """A described backbone: `decoder` is the module that holds embedding, blocks and final norm."""

    model_type: str
    decoder: nn.Module
    hidden_size: int
    layers: list[LayerSites]


@dataclass(frozen=True)
class Layout:
    """One line of the table; names are paths inside the decoder (`blocks`) or inside a block (the rest)."""

    blocks: str = "layers"
    norm: str = "input_layernorm"
    attention: str = "self_attn"
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    projections: tuple[tuple[str, str], ...] = ()  # (targets split by spaces, module path)
    cuts: tuple[tuple[str, Cut], ...] = ()  # module path -> how to cut it, for the fused ones


def config_of(model: nn.Module) -> ModelConfig:
    """The config of a transformers model."""
    return cast("ModelConfig", getattr(model, "config", None))


def head_width(config: ModelConfig) -> int:
    """How many channels a head has."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _cut_qkv(config: ModelConfig) -> dict[str, Rows]:
    """[q | k | v]; fewer key-value heads than heads are allowed."""
    q = config.num_attention_heads * head_width(config)
    kv = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_width(config)
    return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}


def _cut_gate_up(config: ModelConfig) -> dict[str, Rows]:
    return {"gate": slice(0, config.intermediate_size), "up": slice(config.intermediate_size, None)}


def _cut_qkv_by_head(config: ModelConfig) -> dict[str, Rows]:
    """GPT-NeoX: head by head, each [q | k | v]."""
    width = head_width(config)
    rows = torch.arange(3 * config.hidden_size, device="cpu").view(config.num_attention_heads, 3, width)
    return {name: rows[:, i].reshape(-1) for i, name in enumerate("qkv")}


APART = Layout(
    projections=(
        ("q", "self_attn.q_proj"),
        ("k", "self_attn.k_proj"),
        ("v", "self_attn.v_proj"),
        ("gate", "mlp.gate_proj"),
        ("up", "mlp.up_proj"),
    )
)
LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), APART),
    "phi3": Layout(
        projections=(("q k v", "self_attn.qkv_proj"), ("gate up", "mlp.gate_up_proj")),
        cuts=(("self_attn.qkv_proj", _cut_qkv), ("mlp.gate_up_proj", _cut_gate_up)),
    ),
    "gpt2": Layout(
        blocks="h",
        norm="ln_1",
        attention="attn",
        output="attn.c_proj",
        down="mlp.c_proj",
        projections=(("q k v", "attn.c_attn"), ("up", "mlp.c_fc")),
        cuts=(("attn.c_attn", _cut_qkv),),
    ),
    "gpt_neox": Layout(
        attention="attention",
        output="attention.dense",
        down="mlp.dense_4h_to_h",
        projections=(("q k v", "attention.query_key_value"), ("up", "mlp.dense_h_to_4h")),
        cuts=(("attention.query_key_value", _cut_qkv_by_head),),
    ),
}


def layout_of(config: ModelConfig) -> Layout:
    """The table's line for a transformers config. Raises BackboneError with the supported types for any other."""
    model_type = getattr(config, "model_type", None)
    if model_type not in LAYOUTS:
        raise BackboneError(
            f"backbone: the architecture {model_type!r} is not supported; use one of {', '.join(sorted(LAYOUTS))}",
            param="backbone",
        )
    return LAYOUTS[model_type]


def projection_paths(config: ModelConfig) -> dict[str, str]:
    """Module paths inside a block, by q, k, v, gate (if there is one), up, o and down; fused ones share a path.

    Raises BackboneError for an unsupported architecture.
    """
    layout = layout_of(config)
    paths = {target: path for targets, path in layout.projections for target in targets.split()}
    return {**paths, "o": layout.output, "down": layout.down}


def describe(model: nn.Module) -> Architecture:
    """Find the blocks and projections of a transformers model, with a head or without.

    Raises BackboneError for an unsupported architecture.
    """
    config = config_of(model)
    layout = layout_of(config)
    decoder = getattr(model, getattr(model, "base_model_prefix", ""), model)
    blocks = decoder.get_submodule(layout.blocks)
    assert isinstance(blocks, nn.ModuleList), f"{layout.blocks} of {config.model_type} is no list of blocks"
    names = {id(module): name for name, module in model.named_modules()}
    layers = [_describe_block(block, names[id(block)], layout, config) for block in blocks]
    return Architecture(config.model_type, decoder, config.hidden_size, layers)


def _describe_block(block: nn.Module, name: str, layout: Layout, config: ModelConfig) -> LayerSites:
    cuts, sites = dict(layout.cuts), {}
    for targets, path in layout.projections:
        module = block.get_submodule(path)
        rows_of = cuts[path](config) if path in cuts else {targets: None}
        for target in targets.split():
            sites[target] = Site(module, rows_of[target], _width(module, rows_of[target]))
    return LayerSites(
        name=name,
        block=block,
        norm=block.get_submodule(layout.norm),
        attention=block.get_submodule(layout.attention),
        sites=sites,
        output=block.get_submodule(layout.output),
        down=block.get_submodule(layout.down),
    )


def _width(module: nn.Module, rows: Rows) -> int:
    full: int = getattr(module, "out_features" if hasattr(module, "out_features") else "nf")  # transformers' Conv1D
    if rows is None:
        return full
    return len(range(full)[rows]) if isinstance(rows, slice) else len(rows)
