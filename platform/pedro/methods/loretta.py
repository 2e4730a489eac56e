"""LoRETTA_adp as a PEFT tuner (Yang et al. 2024, arXiv 2402.11417): bottleneck adapters of tensor trains.

h ← h + σ(h W_down + b_down) W_up + b_up, both matrices tensor trains: entry (i_1 … i_d) of the reshaped matrix is the
product of the slices G_k[:, i_k, :] of d cores r × n_k × r; Σ r n_k r parameters in place of Π n_k. As in the authors'
code and counts on LLaMA-2, the adapters stand before the gate and up projections and behind the down projection, and
the norms' weights are trained as well. Cores start normal and biases uniform, as theirs do, so that a fresh adapter is
not the identity: a train with a core of zeros would give its other cores no gradient. The shape of the trains is a
setting of the paper; here D is cut into factors of at most 16 and the bottleneck into factors of at most 4, which is
theirs for D = 4096.
Shapes: B rows, T tokens, D model width, R bottleneck, N widths of the block's norms together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from pedro.methods.architectures import Architecture, LayerSites, projection_paths
from pedro.methods.blocks import TunerConfig
from pedro.methods.bottleneck import CANDIDATES
from pedro.methods.deltas import DeltaLayer, DeltaTuner
from pedro.methods.method import Method
from pedro.methods.options import expect, expect_count, expect_names, names_in
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

PREFIX = "loretta_"
SITES = ("gate", "up", "down")
MOST = {"wide": 16, "narrow": 4}  # largest factors of D and of the bottleneck


@dataclass
class LorettaConfig(TunerConfig):
    """Options of LoRETTA_adp. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "LORETTA"

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    rank: int = field(default=5, metadata={"help": "Rank of the tensor trains."})
    activation: str = field(default="relu", metadata={"help": f"One of {', '.join(CANDIDATES)}."})
    targets: tuple[str, ...] = field(default=SITES, metadata={"help": f"Sites, of {', '.join(SITES)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets = tuple(self.targets)
        expect_names("targets", self.targets, SITES)
        expect_count("r", self.r)
        expect_count("rank", self.rank)
        expect(self.activation in tuple(CANDIDATES), "activation", f"one of {', '.join(CANDIDATES)}", self.activation)


def factorized(size: int, most: int) -> tuple[int, ...]:
    """`size` as a product of factors of at most `most`, the largest first; a larger prime stands alone."""
    factors = []
    while size > 1:
        factor = next((n for n in range(min(size, most), 1, -1) if size % n == 0), size)
        factors.append(factor)
        size //= factor
    return tuple(factors) or (1,)


def core_shapes(rows: tuple[int, ...], columns: tuple[int, ...], rank: int) -> list[tuple[int, int, int]]:
    """The cores [r, n, r'] of a tensor train of a matrix Π rows × Π columns; the outer ranks are 1."""
    sizes = (*rows, *columns)
    ranks = [1, *[rank] * (len(sizes) - 1), 1]
    return [(ranks[k], n, ranks[k + 1]) for k, n in enumerate(sizes)]


def contracted(cores: torch.Tensor, shapes: list[tuple[int, int, int]]) -> torch.Tensor:
    """All entries [Π n] of the tensor train whose cores stand one after the other in `cores`."""
    whole = torch.ones(1, 1, device=cores.device)
    for core, (before, n, after) in zip(cores.split([math.prod(shape) for shape in shapes]), shapes, strict=True):
        whole = (whole @ core.view(before, n * after)).view(-1, after)
    return whole.flatten()


class LorettaLayer(DeltaLayer):
    """One block's adapters by place, each "down" and "up" as cores and a bias, and what is added to its norms."""

    adapter_layer_names = (
        *(f"{PREFIX}{site}_{side}_{part}" for site in SITES for side in ("down", "up") for part in ("cores", "bias")),
        f"{PREFIX}norm_weight",  # [N]
        f"{PREFIX}norm_bias",  # [N], of layer norms
    )

    def __init__(self, index: int, layer_sites: LayerSites, first: DeltaLayer | None = None) -> None:
        super().__init__(index, layer_sites, first)
        self._norms: list[Any] = []

    def follow(self, norms: list[nn.Module]) -> None:
        """Train these norms, too."""
        self._norms = norms
        self._handles += [norm.register_forward_hook(partial(self._renorm, i)) for i, norm in enumerate(norms)]

    def update_layer(self, adapter_name: str, config: LorettaConfig) -> None:
        """Add a fresh adapter: normal cores whose product varies as a linear layer's, uniform biases."""
        fresh, hidden = self.fresh(), self.layer_sites.linears["down"].width
        deviation = (hidden + config.r) ** -0.5
        for target in config.targets:
            for side, width in (("down", config.r), ("up", hidden)):
                shapes = self._shapes(config, side)
                cores = [
                    torch.randn(shape, **fresh) * (deviation ** (1 / len(shapes)) / shape[2] ** 0.5) for shape in shapes
                ]
                bias = torch.empty(width, **fresh).uniform_(-(width**-0.5), width**-0.5)
                self._part(target, side, "cores")[adapter_name] = nn.Parameter(torch.cat([c.flatten() for c in cores]))
                self._part(target, side, "bias")[adapter_name] = nn.Parameter(bias)
        zeros = torch.zeros(sum(len(norm.weight) for norm in self._norms), **fresh)
        self._named("norm_weight")[adapter_name] = nn.Parameter(zeros)
        if isinstance(self._norms[0], nn.LayerNorm):
            self._named("norm_bias")[adapter_name] = nn.Parameter(zeros.clone())
        self.configs[adapter_name] = config

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """An adapter behind the projection adds to its output; one before it, through its weight."""
        if target == "down":
            return self.adapted(name, target, output.float())
        return functional.linear(self.adapted(name, target, x), self.base_weight(target))

    def adapted(self, name: str, target: str, hidden: torch.Tensor) -> torch.Tensor:
        """What one adapter makes of a hidden state [B, T, D], without the residual."""
        config = self.configs[name]
        for side in ("down", "up"):
            matrix = contracted(self._part(target, side, "cores")[name], self._shapes(config, side))
            hidden = hidden @ matrix.view(hidden.shape[-1], -1) + self._part(target, side, "bias")[name]
            hidden = CANDIDATES[config.activation](hidden) if side == "down" else hidden
        return hidden

    def _shapes(self, config: LorettaConfig, side: str) -> list[tuple[int, int, int]]:
        wide = factorized(self.layer_sites.linears["down"].width, MOST["wide"])
        narrow = factorized(config.r, MOST["narrow"])
        return core_shapes(*((wide, narrow) if side == "down" else (narrow, wide)), rank=config.rank)

    def _renorm(self, index: int, norm: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """The norm with its weight, and bias, changed: both stand outside the normalization."""
        names = self.live()
        if not names:
            return None
        hidden = args[0].float()
        if isinstance(norm, nn.LayerNorm):
            normed = functional.layer_norm(hidden, norm.normalized_shape, eps=norm.eps)
        else:
            eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
            normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
        changed, widths = output.float(), [len(other.weight) for other in self._norms]
        for name in names:
            changed = changed + normed * self._named("norm_weight")[name].split(widths)[index]
            if name in self._named("norm_bias"):
                changed = changed + self._named("norm_bias")[name].split(widths)[index]
        return changed.to(output.dtype)

    def _named(self, name: str) -> nn.ParameterDict:
        held: nn.ParameterDict = getattr(self, PREFIX + name)
        return held

    def _part(self, target: str, side: str, part: str) -> nn.ParameterDict:
        return self._named(f"{target}_{side}_{part}")


class LorettaModel(DeltaTuner):
    """The tuner that PEFT builds for a LorettaConfig."""

    prefix = PREFIX
    tuner_layer_cls = LorettaLayer
    child = "tensor_trains"
    no_merge = "an adapter's activation cannot be folded into a weight"

    def add(self, block: nn.Module, index: int, adapter_name: str, config: LorettaConfig) -> None:
        """Give the block a layer if it has none, and the layer a fresh adapter; the last one has the final norm."""
        if not hasattr(block, self.child):
            layer = LorettaLayer(index, self._architecture.layers[index])
            layer.follow(_norms(self._architecture, index))
            setattr(block, self.child, layer)
        getattr(block, self.child).update_layer(adapter_name, config)


def _norms(architecture: Architecture, index: int) -> list[nn.Module]:
    """The norms of one block, and behind the last one the decoder's."""
    kind = type(architecture.layers[index].norm)
    last = index == len(architecture.layers) - 1
    modules = [*architecture.layers[index].block.modules(), *(architecture.decoder.children() if last else ())]
    return [module for module in modules if type(module) is kind]


def _build(
    model_config: ModelConfig, *, r: int = 64, rank: int = 5, activation: str = "relu", targets: list[str] | None = None
) -> LorettaConfig:
    paths = projection_paths(model_config)
    chosen = tuple(site for site in SITES if site in paths) if targets is None else names_in("targets", targets)
    return LorettaConfig(r=r, rank=rank, activation=activation, targets=chosen)


register(LorettaConfig, LorettaModel, "loretta")

METHOD = Method(
    name="loretta",
    title="LoRETTA: tensor-train adapters",
    source="Yang et al. 2024, arXiv 2402.11417",
    equation="h ← h + σ(h W_down) W_up, W = Π of tensor-train cores; norms trained",
    build=_build,
    mergeable=False,
    identity_at_init=False,
    reads_weights=True,
)
