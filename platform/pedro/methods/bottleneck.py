"""Bottleneck adapters as a PEFT tuner: Houlsby's, and the Learned-Adapter.

h ← h + σ(h W_down + b_down) W_up + b_up, on a sublayer's output before the residual joins (Houlsby et al. 2019, arXiv
1902.00751, section 2.1). The Learned-Adapter (Zhang et al. 2023, Findings of ACL) learns σ: a mixture of candidates
whose weights are architecture parameters, trained on rows of their own as Θ is.
Shapes: S sites, B rows, T tokens, D model width, R bottleneck, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from pedro.errors import ConfigError
from pedro.methods.architectures import LayerSites, projection_paths
from pedro.methods.blocks import BlockLayer, BlockTuner, TunerConfig
from pedro.methods.method import Method
from pedro.methods.options import expect_count
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

CHILD = "adapters"
SITES = ("attention", "mlp")
LEARNED = "learned"
INIT_STD = 0.02
CANDIDATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "elu": functional.elu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass
class BottleneckConfig(TunerConfig):
    """Options of bottleneck adapters. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "BOTTLENECK"

    r: int = field(default=18, metadata={"help": "Width of the bottleneck."})
    sites: tuple[str, ...] = field(
        default=SITES, metadata={"help": f"Sublayers whose outputs are adapted, of {', '.join(SITES)}."}
    )
    activation: str = field(default="gelu", metadata={"help": f"{LEARNED}, or one of {', '.join(CANDIDATES)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sites = tuple(self.sites)
        expect_count("r", self.r)
        if not self.sites or not all(site in SITES and self.sites.count(site) == 1 for site in self.sites):
            raise ConfigError(f"sites: expected distinct names of {', '.join(SITES)}, got {self.sites}", param="sites")
        if self.activation not in (LEARNED, *CANDIDATES):
            raise ConfigError(
                f"activation: expected {LEARNED} or one of {', '.join(CANDIDATES)}, got {self.activation!r}",
                param="activation",
            )


class BottleneckLayer(BlockLayer):
    """The adapters of one block, by name; `sites` of the config lie along the first axis."""

    adapter_layer_names = (
        "bottleneck_down",  # [S, D, R]
        "bottleneck_down_bias",  # [S, R]
        "bottleneck_up",  # [S, R, D]
        "bottleneck_up_bias",  # [S, D]
        "bottleneck_mix",  # [S, C]
    )
    bottleneck_down: nn.ParameterDict
    bottleneck_down_bias: nn.ParameterDict
    bottleneck_up: nn.ParameterDict
    bottleneck_up_bias: nn.ParameterDict
    bottleneck_mix: nn.ParameterDict

    def __init__(self, index: int, layer_sites: LayerSites, width: int) -> None:
        super().__init__(index, layer_sites)
        self.width = width
        modules = {"attention": layer_sites.output, "mlp": layer_sites.down}
        self._handles = [m.register_forward_hook(partial(self._adapt, site)) for site, m in modules.items()]

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add a fresh adapter, which changes nothing: W_down ~ N(0, 0.02), all else zero."""
        fresh, count = self.fresh(), len(config.sites)
        down = torch.empty(count, self.width, config.r, **fresh).normal_(std=INIT_STD)
        self.bottleneck_down[adapter_name] = nn.Parameter(down)
        self.bottleneck_down_bias[adapter_name] = nn.Parameter(torch.zeros(count, config.r, **fresh))
        self.bottleneck_up[adapter_name] = nn.Parameter(torch.zeros(count, config.r, self.width, **fresh))
        self.bottleneck_up_bias[adapter_name] = nn.Parameter(torch.zeros(count, self.width, **fresh))
        if config.activation == LEARNED:
            self.bottleneck_mix[adapter_name] = nn.Parameter(torch.zeros(count, len(CANDIDATES), **fresh))
        self.configs[adapter_name] = config

    def forward(self, hidden: torch.Tensor, site: str, adapter_name: str) -> torch.Tensor:
        """What one adapter adds to a sublayer's output, float32: hidden [B, T, D] -> [B, T, D]."""
        config = self.configs[adapter_name]
        index = config.sites.index(site)
        narrow = hidden @ self.bottleneck_down[adapter_name][index] + self.bottleneck_down_bias[adapter_name][index]
        if config.activation == LEARNED:
            weights = self.bottleneck_mix[adapter_name][index].softmax(dim=0)  # [C]
            narrow = torch.stack([w * act(narrow) for w, act in zip(weights, CANDIDATES.values(), strict=True)]).sum(0)
        else:
            narrow = CANDIDATES[config.activation](narrow)
        wide: torch.Tensor = (
            narrow @ self.bottleneck_up[adapter_name][index] + self.bottleneck_up_bias[adapter_name][index]
        )
        return wide

    def _adapt(self, site: str, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        names = [name for name in self.live() if site in self.configs[name].sites]
        if not names:
            return None
        hidden = output.float()
        for name in names:
            hidden = hidden + self(hidden, site, name)
        return hidden.to(output.dtype)


class BottleneckModel(BlockTuner):
    """The tuner that PEFT builds for a BottleneckConfig."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    child = CHILD
    packs = shares_beginnings = True
    no_merge = "an adapter's activation cannot be folded into a weight"

    def add(self, block: nn.Module, index: int, adapter_name: str, config: BottleneckConfig) -> None:
        """Give the block a BottleneckLayer if it has none, and the layer a fresh adapter."""
        if not hasattr(block, CHILD):
            layer = BottleneckLayer(index, self._architecture.layers[index], self._architecture.hidden_size)
            setattr(block, CHILD, layer)
        getattr(block, CHILD).update_layer(adapter_name, config)


def _build_houlsby(model_config: ModelConfig, *, r: int = 18, activation: str = "gelu") -> BottleneckConfig:
    projection_paths(model_config)
    return BottleneckConfig(r=r, activation=activation)


def _build_learned(model_config: ModelConfig, *, r: int = 36) -> BottleneckConfig:
    projection_paths(model_config)
    return BottleneckConfig(r=r, sites=("mlp",), activation=LEARNED)


register(BottleneckConfig, BottleneckModel)

HOULSBY = Method(
    name="houlsby",
    title="Houlsby adapter",
    source="Houlsby et al. 2019, arXiv 1902.00751",
    equation="h ← h + σ(h W_down) W_up, two a layer",
    build=_build_houlsby,
    mergeable=False,
    identity_at_init=True,
)
LEARNED_ADAPTER = Method(
    name="learned-adapter",
    title="Learned-Adapter",
    source="Zhang et al. 2023, Findings of ACL",
    equation="h ← h + σ(h W_down) W_up, σ a learned mixture",
    build=_build_learned,
    mergeable=False,
    identity_at_init=True,
    theta=(".bottleneck_mix.",),
)
METHODS = (HOULSBY, LEARNED_ADAPTER)
