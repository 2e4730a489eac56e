"""Sparse structure search as a PEFT tuner (SSP; S³Delta, Hu et al. 2022, arXiv 2206.07382).

The super-network has two candidates at every linear: a LoRA module and a shift. Each has a gate with a logit α. While
the search lasts, gates are open with p = σ(α − ζ), with ζ such that the open parameters are expected to be the budget
(shifted global sigmoid, section 3.3), sampled as binary concrete variables; α is trained on rows of its own as Θ is.
Then the most open candidates that fit the budget are kept and trained further; only they are saved.
Shapes: B rows, T tokens, C candidates of all layers, c those of one block [2, targets].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from pedro.adapter_kinds import Adapter, LowRank
from pedro.errors import AdapterError
from pedro.methods.architectures import LINEARS, Architecture, LayerSites
from pedro.methods.blocks import TunerConfig
from pedro.methods.deltas import DeltaLayer, DeltaTuner
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect, expect_count, expect_names, targets_of
from pedro.methods.peft_registration import register
from pedro.methods.reader import ROOT, Reader, SavedTensors, input_width

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

CHILD = "candidates"
PREFIX = "sparse_search_"
PARTS = ("lora", "shift")


@dataclass
class SparseSearchConfig(TunerConfig):
    """Options of the search; `kept` is its result. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "SPARSE_SEARCH"

    r: int = field(default=8, metadata={"help": "Rank of each LoRA candidate."})
    alpha: int = field(default=16, metadata={"help": "LoRA's alpha."})
    targets: tuple[str, ...] = field(
        default=LINEARS, metadata={"help": f"Linears with candidates, of {', '.join(LINEARS)}."}
    )
    budget: float = field(default=0.4, metadata={"help": "Share of the super-network's parameters that is kept."})
    search: float = field(default=0.5, metadata={"help": "Share of the steps in which the structure is searched."})
    kept: tuple[str, ...] | None = field(
        default=None, metadata={"help": "The kept candidates as layer.part.target; None while the search lasts."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets = tuple(self.targets)
        self.kept = None if self.kept is None else tuple(self.kept)
        expect_count("r", self.r)
        expect_count("alpha", self.alpha)
        for name, most in (("budget", 1.0), ("search", 0.9)):
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and 0 < value <= most
            expect(good, name, f"a share in (0, {most:g}]", value)
        expect_names("targets", self.targets, LINEARS)


class SparseSearchLayer(DeltaLayer):
    """The candidates of one block, by adapter: at target t, A [r, in], B [width, r] and a shift [width]."""

    adapter_layer_names = (
        *(f"{PREFIX}{part}_{target}" for target in LINEARS for part in ("a", "b", "shift")),
        f"{PREFIX}gates",  # [2, targets], logits of the two parts
    )

    def __init__(self, index: int, layer_sites: LayerSites, first: DeltaLayer | None = None) -> None:
        super().__init__(index, layer_sites, first)
        self.open: dict[str, torch.Tensor] = {}  # how far each candidate is open [2, targets]; no entry: fully

    def update_layer(self, adapter_name: str, config: SparseSearchConfig) -> None:
        """Add fresh candidates, which change nothing: all of them, or those that the config says were kept."""
        fresh = self.fresh()
        for target in config.targets:
            wide, width = self.inputs(target), self.layer_sites.linears[target].width
            if self._has(config, "lora", target):
                down = nn.init.kaiming_uniform_(torch.empty(config.r, wide, **fresh), a=5**0.5)
                self.part("a", target)[adapter_name] = nn.Parameter(down)
                self.part("b", target)[adapter_name] = nn.Parameter(torch.zeros(width, config.r, **fresh))
            if self._has(config, "shift", target):
                self.part("shift", target)[adapter_name] = nn.Parameter(torch.zeros(width, **fresh))
        if config.kept is None:
            gates = torch.zeros(len(PARTS), len(config.targets), **fresh)
            getattr(self, f"{PREFIX}gates")[adapter_name] = nn.Parameter(gates)
        self.configs[adapter_name] = config

    def part(self, name: str, target: str) -> nn.ParameterDict:
        """The parameters a, b or shift of one target, by adapter."""
        held: nn.ParameterDict = getattr(self, f"{PREFIX}{name}_{target}")
        return held

    def gates(self, adapter_name: str) -> nn.Parameter:
        """The logits [2, targets] of a search that is not over."""
        logits: nn.Parameter = getattr(self, f"{PREFIX}gates")[adapter_name]
        return logits

    def sizes(self, adapter_name: str) -> torch.Tensor:
        """Parameters of each candidate [2, targets]."""
        targets = self.configs[adapter_name].targets
        lora = [sum(self.part(n, t)[adapter_name].numel() for n in ("a", "b")) for t in targets]
        return torch.tensor([lora, [self.part("shift", t)[adapter_name].numel() for t in targets]])

    def prune(self, adapter_name: str, config: SparseSearchConfig) -> None:
        """Delete the gates and what `config.kept` does not name."""
        for target in config.targets:
            for names, part in ((("a", "b"), "lora"), (("shift",), "shift")):
                if not self._has(config, part, target):
                    for name in names:
                        del self.part(name, target)[adapter_name]
        del getattr(self, f"{PREFIX}gates")[adapter_name]
        self.open.pop(adapter_name, None)

    def _has(self, config: SparseSearchConfig, part: str, target: str) -> bool:
        return config.kept is None or f"{self.index}.{part}.{target}" in config.kept

    def delta(self, name: str, target: str, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        """What the open candidates of one target add to its output: x [B, T, in] -> [B, T, width] or [width]."""
        config, opened = self.configs[name], self.open.get(name)
        index, added = config.targets.index(target), None
        if name in self.part("a", target):
            added = x @ self.part("a", target)[name].T @ self.part("b", target)[name].T * (config.alpha / config.r)
            added = added if opened is None else added * opened[0, index]
        if name in self.part("shift", target):
            shift = self.part("shift", target)[name]
            shift = shift if opened is None else shift * opened[1, index]
            added = shift if added is None else added + shift
        return added


class SparseSearchModel(DeltaTuner):
    """The tuner that PEFT builds for a SparseSearchConfig."""

    prefix = PREFIX
    tuner_layer_cls = SparseSearchLayer
    child = CHILD
    no_merge = "a linear without a bias, as most backbones have, can hold no shift"


class SparseSearch:
    """The `TrainingHook` of a search: opens the gates in every forward pass, then decides, then takes the rest off."""

    def __init__(self, model: Any, steps: int) -> None:
        self.config: SparseSearchConfig = model.peft_config["default"]
        self.layers: list[SparseSearchLayer] = list(model.base_model.layers())
        self.last: int = max(1, round(self.config.search * steps))  # step after which the structure is decided
        self.sizes = torch.cat([layer.sizes("default").flatten() for layer in self.layers])  # [C]
        self.decided: torch.Tensor | None = None  # [C] bool
        self._handle = model.get_base_model().register_forward_pre_hook(self._open_gates)

    def penalty(self) -> None:
        """Nothing is added to the loss: the budget holds by construction."""
        return None

    def after_step(self, step: int) -> None:
        """Decide, once, when the search has lasted long enough."""
        if step >= self.last and self.decided is None:
            self.decided = choose(self._logits().detach().cpu(), self.sizes, self.config.budget)

    def settled(self, step: int) -> bool:
        """Whether the structure is decided."""
        return step >= self.last

    def finish(self) -> None:
        """Delete gates and candidates that are not kept, and write down what is."""
        assert self.decided is not None, "a run ends after the search"
        names = [
            f"{layer.index}.{part}.{target}"
            for layer in self.layers
            for part in PARTS
            for target in self.config.targets
        ]
        self.config.kept = tuple(name for name, kept in zip(names, self.decided.tolist(), strict=True) if kept)
        for layer in self.layers:
            layer.prune("default", self.config)
        self._handle.remove()

    def kept(self) -> int:
        """Parameters of the candidates that were decided for; of all of them before that."""
        return int(self.sizes.sum() if self.decided is None else self.sizes[self.decided].sum())

    def state(self) -> dict[str, torch.Tensor]:
        """What was decided, if it was."""
        return {} if self.decided is None else {"decided": self.decided}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a decision."""
        self.decided = state.get("decided")

    def _logits(self) -> torch.Tensor:
        return torch.cat([layer.gates("default").flatten() for layer in self.layers])  # [C]

    def _open_gates(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        logits = self._logits()
        if self.decided is not None:
            opened = self.decided.to(logits) + 0.0 * logits  # Θ steps continue, and find nothing left to move
        else:
            logits = logits - balance(logits.detach(), self.sizes.to(logits), self.config.budget)
            if model.training:  # a binary concrete variable at temperature 1
                logits = logits + torch.logit(torch.rand_like(logits), eps=1e-6)
            opened = logits.sigmoid()
        for layer, part in zip(self.layers, opened.chunk(len(self.layers)), strict=True):
            layer.open["default"] = part.view(len(PARTS), -1)


def balance(logits: torch.Tensor, sizes: torch.Tensor, budget: float) -> float:
    """ζ such that Σ σ(α − ζ) size = budget · Σ size, by bisection: logits [C], sizes [C]."""
    if budget >= 1:
        return float(logits.min()) - 30.0
    low, high = float(logits.min()) - 30.0, float(logits.max()) + 30.0
    for _ in range(60):
        middle = (low + high) / 2
        too_much = ((logits - middle).sigmoid() * sizes).sum() > budget * sizes.sum()
        low, high = (middle, high) if too_much else (low, middle)
    return (low + high) / 2


def choose(logits: torch.Tensor, sizes: torch.Tensor, budget: float) -> torch.Tensor:
    """Which candidates [C] are kept: the most open ones that fit into the budget together, and at least one."""
    left, kept = budget * float(sizes.sum()), torch.zeros(len(logits), dtype=torch.bool)
    for index in logits.argsort(descending=True, stable=True).tolist():
        if sizes[index] <= left:
            kept[index] = True
            left -= float(sizes[index])
    if not kept.any():
        kept[int(sizes.argmin())] = True
    return kept


def _build(
    model_config: ModelConfig,
    *,
    r: int = 8,
    alpha: int = 16,
    targets: Targets = None,
    budget: float = 0.4,
    search: float = 0.5,
) -> SparseSearchConfig:
    return SparseSearchConfig(r=r, alpha=alpha, targets=targets_of(model_config, targets), budget=budget, search=search)


def _read(config: SparseSearchConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """For the engine: the LoRA modules and shifts that the search kept."""
    if config.kept is None:
        raise AdapterError("adapter: its structure search has not ended; train it to the end")
    low_rank, shifts = [], []
    for index, block in enumerate(architecture.layers):
        terms: dict[str, LowRank] = {}
        shift: dict[str, torch.Tensor] = {}
        prefix = f"{ROOT}{block.name}.{CHILD}.{PREFIX}"
        for target in (target for target in config.targets if target in block.linears):
            inputs, width = input_width(block, [target], architecture.hidden_size), block.linears[target].width
            if f"{index}.lora.{target}" in config.kept:
                a = tensors.take(f"{prefix}a_{target}", (config.r, inputs)).T
                b = tensors.take(f"{prefix}b_{target}", (width, config.r)).T * (config.alpha / config.r)
                terms[target] = LowRank(a, b)
            if f"{index}.shift.{target}" in config.kept:
                shift[target] = tensors.take(f"{prefix}shift_{target}", (width,))
        low_rank.append(terms)
        shifts.append(shift)
    return Adapter(low_rank=tuple(low_rank), shift=tuple(shifts))


register(SparseSearchConfig, SparseSearchModel, "ssp")

METHOD = Method(
    name="ssp",
    title="SSP: sparse structure search",
    source="Hu et al. 2022, arXiv 2206.07382",
    equation="y ← y + z₁ (α/r) B A x + z₂ b, gates z at a budget",
    build=_build,
    readers=(Reader(SparseSearchConfig.kind, _read),),
    mergeable=False,
    identity_at_init=True,
    theta=(f".{PREFIX}gates.",),
    make_hook=lambda model, steps, _options: SparseSearch(model, steps),
)
