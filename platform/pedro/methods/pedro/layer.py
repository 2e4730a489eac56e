"""One block's share of PEDRO: makes the block's vectors and scales its projections.

The layer is a child of the block and replaces nothing. A hook before the block makes the vectors and hands them down
as a keyword argument, so that they belong to this very call (and to its recomputation under gradient checkpointing,
which repeats the block with the same arguments); a hook before the attention takes them off again; hooks after the
projections scale. Shapes: B rows, T tokens, D model width, R bottleneck, W all targets' entries together.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from pedro.adapter_kinds import GeneratorWeights, generate_vectors
from pedro.errors import ConfigError
from pedro.methods.blocks import BlockLayer
from pedro.methods.pedro.rational import fit_gelu

if TYPE_CHECKING:
    from pedro.methods.architectures import LayerSites, Rows
    from pedro.methods.packing import Packing
    from pedro.methods.pedro.config import PedroConfig
    from pedro.methods.prompt import PromptPass, Vectors

BASE = "__base__"  # PEFT's name, in adapter_names, for a row without an adapter
HANDED_DOWN = "pedro_vectors"


class Scaling(NamedTuple):
    """Vectors, the tokens [B, T] bool of this call that they scale (None: all), and how it is packed, if it is."""

    vectors: Vectors
    tokens: torch.Tensor | None
    packing: Packing | None = None

    def on(self, scale: torch.Tensor) -> torch.Tensor:
        """One of the vectors [B, W] as factors of an output [B, T, W], or of a packed one [1, N, W]."""
        factors = scale[:, None] if self.packing is None else self.packing.spread(scale)
        return factors if self.tokens is None else torch.where(self.tokens[..., None], factors, 1.0)


class PedroLayer(BlockLayer):
    """The generators of one block, one an adapter."""

    adapter_layer_names = ("pedro_down", "pedro_up", "pedro_bias", "pedro_a", "pedro_b")
    other_param_names = ("configs", "activations")
    pedro_down: nn.ParameterDict  # [D, R]
    pedro_up: nn.ParameterDict  # [R, W]
    pedro_bias: nn.ParameterDict  # [W]
    pedro_a: nn.ParameterDict  # [m+1]
    pedro_b: nn.ParameterDict  # [n]

    def __init__(self, index: int, layer_sites: LayerSites, width: int, prompts: PromptPass) -> None:
        super().__init__(index, layer_sites)
        self.width, self.prompts = width, prompts
        self.configs: dict[str, PedroConfig] = {}
        self.activations: dict[str, str] = {}
        self._scalings: list[Scaling] = []
        self._handles = self._hook()

    def update_layer(self, adapter_name: str, config: PedroConfig, num_layers: int) -> None:
        """Add a fresh adapter, which changes nothing: W_down ~ N(0, `init_std`), W_up = 0, b_up = 1, R = GELU."""
        activation, r, orders = config.by_layer(num_layers)[self.index]
        total = sum(self._entries(config))
        fresh = self.fresh()
        self.pedro_down[adapter_name] = nn.Parameter(
            torch.empty(self.width, r, **fresh).normal_(std=config.spread(self.width))
        )
        self.pedro_up[adapter_name] = nn.Parameter(torch.zeros(r, total, **fresh))
        self.pedro_bias[adapter_name] = nn.Parameter(torch.ones(total, **fresh))
        if activation == "rational":
            a, b = fit_gelu(*orders)
            self.pedro_a[adapter_name] = nn.Parameter(a.to(**fresh))
            self.pedro_b[adapter_name] = nn.Parameter(b.to(**fresh))
        self.configs[adapter_name], self.activations[adapter_name] = config, activation

    def generator(self, adapter_name: str) -> GeneratorWeights:
        """One adapter's generator of this block."""
        learned = adapter_name in self.pedro_a
        return GeneratorWeights(
            self.pedro_down[adapter_name],
            self.pedro_up[adapter_name],
            self.pedro_bias[adapter_name],
            self.activations[adapter_name],
            self.pedro_a[adapter_name] if learned else None,
            self.pedro_b[adapter_name] if learned else None,
        )

    def forward(self, hidden: torch.Tensor, prompt: torch.Tensor, adapter_name: str) -> Vectors:
        """The vectors {target: [B, width]} of the rows' prompts: hidden [B, T, D], or packed [1, N, D], prompt [B, T]
        bool."""
        config, pooled = self.configs[adapter_name], self.pooled(hidden, prompt, adapter_name)
        made = self.made(pooled, adapter_name).split(self._entries(config), dim=-1)
        if config.group_size != 1:
            made = tuple(vector.repeat_interleave(config.group_size, dim=-1) for vector in made)
        return dict(zip(config.targets, made, strict=True))

    def made(self, pooled: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """All entries of the vectors [B, W] of pooled prompts [B, D]."""
        return generate_vectors(pooled, self.generator(adapter_name))

    def pooled(self, hidden: torch.Tensor, prompt: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The rows' prompts [B, D] as one adapter's generator reads them; arguments as of `forward`."""
        config = self.configs[adapter_name]
        norm = self.layer_sites.norm if config.pool_source == "normed" else None
        packing = None if hidden.shape[:2] == prompt.shape else self.prompts.packing
        return pool(hidden, prompt, config.pool, norm, config.window, packing)

    def _entries(self, config: PedroConfig) -> list[int]:
        return config.entries([self.layer_sites.sites[target].width for target in config.targets])

    def _hook(self) -> list[Any]:
        layer_sites = self.layer_sites
        by_module: dict[nn.Module, list[tuple[str, Rows]]] = {}
        for target, site in layer_sites.sites.items():
            by_module.setdefault(site.module, []).append((target, site.rows))
        return [
            layer_sites.block.register_forward_pre_hook(self._before_block, with_kwargs=True),
            layer_sites.attention.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            *(module.register_forward_hook(partial(self._scale, cuts)) for module, cuts in by_module.items()),
        ]

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        names = self.prompts.adapter_names
        if self.disable_adapters or not (names or self.active_adapters):
            return None
        _refuse_reentrant_checkpointing(block)
        if not self.prompts.open:
            raise RuntimeError(
                "call the model that carries the adapter, not a part of it: its prompts are unknown here"
            )
        prompt = self.prompts.read()
        if prompt is None:
            kept = self.prompts.vectors.get(self.index)
            if kept is None:
                raise ConfigError(
                    "past_key_values: this cache was filled without the adapter, so it holds no vectors; "
                    "read the prompt again with the adapter on",
                    param="past_key_values",
                )
            scalings = [Scaling(kept, None)]
        else:
            hidden, packing = args[0] if args else kwargs["hidden_states"], self.prompts.packing
            hidden = packing.pad(hidden) if names and packing is not None else hidden
            prompt = prompt.to(hidden.device)
            made = self._mixed(hidden, prompt, names) if names else self._together(hidden, prompt)
            scalings = [Scaling(vectors, _scaled(prompt, tail, packing), packing) for tail, vectors in made.items()]
            self.prompts.vectors[self.index] = _product(made.values())  # what comes after the prompt takes all of them
        return args, {**kwargs, HANDED_DOWN: scalings}

    def _together(self, hidden: torch.Tensor, prompt: torch.Tensor) -> dict[int | None, Vectors]:
        """Vectors of the active adapters by the tail that they scale; of several, their product."""
        made: dict[int | None, list[Vectors]] = {}
        for name in self.active_adapters:
            if name in self.configs:
                own = self(hidden, self._head(prompt, name), name)
                made.setdefault(self.configs[name].scaled_tail, []).append(own)
        return {tail: _product(vectors) for tail, vectors in made.items()}

    def _mixed(self, hidden: torch.Tensor, prompt: torch.Tensor, names: list[str]) -> dict[int | None, Vectors]:
        """Vectors by the tail that they scale, where each row has an adapter of its own; ones for a row without and for
        a target not its own."""
        if len(names) != len(hidden):
            raise ConfigError(
                f"adapter_names: expected one name a row, {len(hidden)}, got {len(names)}", param="adapter_names"
            )
        made: dict[int | None, Vectors] = {}
        for name in dict.fromkeys(names):
            if name == BASE:
                continue
            vectors = made.setdefault(self.configs[name].scaled_tail, {})
            rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=hidden.device)
            for target, own in self(hidden[rows], self._head(prompt, name)[rows], name).items():
                ones = own.new_ones(len(hidden), own.shape[-1])
                vectors[target] = vectors.get(target, ones).index_copy(0, rows, own)
        return made

    def _head(self, prompt: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The tokens [B, T] that an adapter's vectors come from."""
        config = self.configs[adapter_name]
        if config.lacks_head_end:
            raise ConfigError(
                "method.head_end: conditioning: system needs the tokens that end the system turn, which a training job "
                "finds; give them",
                param="method.head_end",
            )
        end = config.head_end
        return prompt if end is None else self.prompts.head(prompt, end)

    def _before_attention(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._scalings = kwargs.pop(HANDED_DOWN, [])
        return args, kwargs

    def _scale(
        self, cuts: list[tuple[str, Rows]], module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        made = output
        for scaling in self._scalings:
            vectors = scaling.vectors
            if not any(target in vectors for target, _ in cuts):
                continue
            if cuts[0][1] is None:
                scale = vectors[cuts[0][0]]
            else:  # fused: ones where a projection is not a target
                one = next(iter(vectors.values()))
                scale = one.new_ones(len(one), output.shape[-1])
                for target, rows in cuts:
                    if target in vectors:
                        scale[:, rows.to(scale.device) if isinstance(rows, torch.Tensor) else rows] = vectors[target]
            made = made * scaling.on(scale)
        return None if made is output else made.to(output.dtype)  # float32 product, then the model's dtype


def _scaled(prompt: torch.Tensor, tail: int | None, packing: Packing | None) -> torch.Tensor | None:
    """Which tokens vectors scale that leave a prompt's beginning as it is; None where they scale all."""
    if tail is None:
        return None
    tokens = tail_of(prompt, tail)
    return tokens if packing is None else packing.pack(tokens)


def tail_of(prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` tokens of each row's prompt and what follows them: prompt [B, T] bool -> [B, T] bool."""
    return prompt.flip(1).cumsum(1).flip(1) <= count


def _product(made: Iterable[Vectors]) -> Vectors:
    vectors: Vectors = {}
    for one in made:
        for target, vector in one.items():
            vectors[target] = vectors[target] * vector if target in vectors else vector
    return vectors


def pool(
    hidden: torch.Tensor,
    prompt: torch.Tensor,
    how: str,
    norm: nn.Module | None,
    window: int | None = None,
    packing: Packing | None = None,
) -> torch.Tensor:
    """The prompt as one vector a row: hidden [B, T, D], or packed [1, N, D], prompt [B, T] bool -> [B, D], float32 for
    mean and max.

    `norm` is applied token by token before pooling; for `last`, to that token only. With `window`, only that many of
    the prompt's last tokens are pooled.
    """
    if window is not None:
        prompt = prompt & tail_of(prompt, window)
    if how == "last":
        position = (prompt * torch.arange(prompt.shape[1], device=prompt.device)).argmax(dim=1)  # [B]
        if packing is not None:
            hidden = hidden.squeeze(0).index_select(0, packing.at(position))[:, None]  # [B, 1, D]
        else:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), position, None]
        return (hidden if norm is None else norm(hidden))[:, 0]
    outside = ~prompt[..., None]  # [B, T, 1]
    hidden = hidden if norm is None else norm(hidden)
    hidden = (hidden if packing is None else packing.pad(hidden)).float()
    if how == "mean":
        return hidden.masked_fill(outside, 0.0).sum(dim=1) / (~outside).sum(dim=1)
    return hidden.masked_fill(outside, float("-inf")).amax(dim=1)


def _refuse_reentrant_checkpointing(block: nn.Module) -> None:
    """Reentrant checkpointing would run a second backward through the vectors, to wrong gradients."""
    active = block.training and getattr(block, "gradient_checkpointing", False)
    if active and getattr(block._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False):
        raise ConfigError(
            "gradient_checkpointing: PEDRO needs use_reentrant=False; call "
            'gradient_checkpointing_enable({"use_reentrant": False})',
            param="gradient_checkpointing",
        )
