"""ReFT as a PEFT tuner: a prompt's first and last tokens are edited behind blocks (Wu et al. 2024, arXiv 2404.03592).

LoReFT (eq. 2): h ← h + Rᵀ (W h + b − R h), where R has orthonormal rows. DiReFT (section 3.2) without the difference
and without orthonormality: h ← h + W₂ᵀ (W₁ h + b). An answer is never edited. Positions are written and cut as in
pyreft, the paper's library: "f7+l7" are the prompt's first and last seven tokens, at most half of it from either end.
Shapes: P parts (1, or 2 where the first tokens and the last have edits of their own), D model width, R rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from pedro.adapter_kinds import Adapter, Edit, Edits
from pedro.errors import ConfigError
from pedro.methods.architectures import Architecture, projection_paths
from pedro.methods.blocks import BlockLayer, TunerConfig
from pedro.methods.conditioned import ConditionedTuner
from pedro.methods.method import Method
from pedro.methods.options import LARGEST, expect, expect_count, is_count
from pedro.methods.peft_registration import register
from pedro.methods.reader import ROOT, Reader, SavedTensors

if TYPE_CHECKING:
    from pedro.methods.prompt import PromptPass
    from pedro.model_protocols import ModelConfig

CHILD = "edits"
POSITIONS = re.compile(r"(?=[fl])(?:f(?P<first>[0-9]{1,6}))?(?:(?:^|\+)l(?P<last>[0-9]{1,6}))?")


@dataclass
class ReftConfig(TunerConfig):
    """Options of ReFT. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "REFT"

    r: int = field(default=4, metadata={"help": "Rank of the subspace that is edited."})
    direct: bool = field(default=False, metadata={"help": "DiReFT: no difference to R h, and no orthonormal R."})
    positions: str = field(default="f7+l7", metadata={"help": "A prompt's first and last tokens: f7, l1, f7+l7."})
    shared: bool = field(default=True, metadata={"help": "One edit for first and last tokens alike."})
    layers: tuple[int, ...] | None = field(
        default=None, metadata={"help": "The blocks behind which tokens are edited, from 0; None: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("r", self.r)
        for name in ("direct", "shared"):
            expect(isinstance(getattr(self, name), bool), name, "true or false", getattr(self, name))
        good = isinstance(self.positions, str) and POSITIONS.fullmatch(self.positions) and any(self.ends)
        expect(bool(good), "positions", "numbers of first and last tokens, such as f7+l7, f3 or l1", self.positions)
        if self.layers is not None:
            good = isinstance(self.layers, (list, tuple)) and len(set(map(str, self.layers))) == len(self.layers) > 0
            good = good and all(is_count(each) and 0 <= each < LARGEST for each in self.layers)
            expect(bool(good), "layers", "a list of distinct whole numbers, from 0", self.layers)
            self.layers = tuple(self.layers)

    @property
    def ends(self) -> tuple[int, int]:
        """How many first and last tokens are edited."""
        match = POSITIONS.fullmatch(self.positions)
        assert match is not None, "checked when it was made"
        return int(match["first"] or 0), int(match["last"] or 0)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """The first and last tokens of each part; one that edits nothing has none."""
        first, last = self.ends
        return ((first, last),) if self.shared or not (first and last) else ((first, 0), (0, last))

    def edits(self, layer: int) -> bool:
        """Whether tokens are edited behind this block."""
        return self.layers is None or layer in self.layers


class ReftLayer(BlockLayer):
    """The edits behind one block."""

    adapter_layer_names = (
        "reft_rotation",  # [P, D, R]: of LoReFT, Rᵀ is what Gram and Schmidt make of it; of DiReFT, it is W₂ᵀ
        "reft_source",  # [P, R, D]: W, or W₁
        "reft_bias",  # [P, R]
    )
    reft_rotation: nn.ParameterDict
    reft_source: nn.ParameterDict
    reft_bias: nn.ParameterDict

    def __init__(self, index: int, architecture: Architecture, prompts: PromptPass) -> None:
        super().__init__(index, architecture.layers[index])
        self.width, self.prompts = architecture.hidden_size, prompts
        self._handles = [self.layer_sites.block.register_forward_hook(self._after_block)]

    def update_layer(self, adapter_name: str, config: ReftConfig) -> None:
        """Add a fresh adapter: random, as in pyreft, so that it changes something at once."""
        fresh, bound = self.fresh(), self.width**-0.5
        parts, r = len(config.parts), config.r
        self.reft_rotation[adapter_name] = nn.Parameter(torch.empty(parts, self.width, r, **fresh).normal_(std=bound))
        self.reft_source[adapter_name] = nn.Parameter(
            torch.empty(parts, r, self.width, **fresh).uniform_(-bound, bound)
        )
        self.reft_bias[adapter_name] = nn.Parameter(torch.empty(parts, r, **fresh).uniform_(-bound, bound))
        self.configs[adapter_name] = config

    def _after_block(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """The block's output [B, T, D] with the prompts' tokens edited, in float32 and back in the model's dtype."""
        prompt = self.prompts.read() if self.live() else None
        if prompt is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        changed, packing = hidden.clone(), self.prompts.packing
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            for name in self.live():
                config = self.configs[name]
                tensors = (self.reft_rotation[name], self.reft_source[name], self.reft_bias[name])
                for (first, last), *part in zip(config.parts, *tensors, strict=True):
                    at = _ends_of(prompt.to(hidden.device), first, last)
                    at = at if packing is None else packing.pack(at)
                    tokens = changed[at].float()  # [n, D]
                    edit = make_edit(config.direct, *part)
                    changed[at] = (tokens + (tokens @ edit.a + edit.c) @ edit.b).to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def make_edit(direct: bool, rotation: torch.Tensor, source: torch.Tensor, bias: torch.Tensor) -> Edit:
    """One part's edit: rotation [D, R], source [R, D], bias [R]."""
    if direct:
        return Edit(source.T, bias, rotation.T)
    basis, upper = torch.linalg.qr(rotation)
    basis = basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)  # an orthonormal rotation is its own basis
    return Edit(source.T - basis, bias, basis.T)


def _ends_of(prompt: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """The prompts' [B, T] bool first and last tokens, at most half of each prompt from either end."""
    rank, length = prompt.cumsum(1), prompt.sum(1, keepdim=True)  # from 1; [B, 1]
    half = length // 2
    return prompt & ((rank <= half.clamp(max=first)) | (rank > length - half.clamp(max=last)))


class ReftModel(ConditionedTuner):
    """The tuner that PEFT builds for a ReftConfig."""

    prefix = "reft_"
    tuner_layer_cls = ReftLayer
    child = CHILD
    packs = True
    title = "ReFT"
    no_merge = "edits are of some tokens alone, so no weights can hold them"

    def check(self, config: ReftConfig, architecture: Architecture) -> None:
        """Raise ConfigError for blocks that the backbone lacks, and a rank beyond its width."""
        _check(config, len(architecture.layers), architecture.hidden_size)

    def add(self, block: nn.Module, index: int, adapter_name: str, config: ReftConfig) -> None:
        """Give the block a ReftLayer if it has none, and the layer a fresh adapter."""
        if not hasattr(block, CHILD):
            setattr(block, CHILD, ReftLayer(index, self._architecture, self._prompts))
        getattr(block, CHILD).update_layer(adapter_name, config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._blocks and peft_config.edits(self._blocks[key])


def _check(config: ReftConfig, num_layers: int, width: int) -> None:
    if config.layers is not None and max(config.layers) >= num_layers:
        raise ConfigError(f"layers: expected 0 to {num_layers - 1}, got {max(config.layers)}", param="layers")
    expect(config.r <= width, "r", f"at most {width}, the backbone's width", config.r)


def _build(
    model_config: ModelConfig,
    *,
    r: int = 4,
    direct: bool = False,
    positions: str = "f7+l7",
    shared: bool = True,
    layers: list[int] | tuple[int, ...] | None = None,
) -> ReftConfig:
    projection_paths(model_config)
    config = ReftConfig(r=r, direct=direct, positions=positions, shared=shared, layers=layers)  # type: ignore[arg-type]
    _check(config, model_config.num_hidden_layers, model_config.hidden_size)
    return config


def _read(config: ReftConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """For the engine: an edit for each block and part."""
    width, r, parts = architecture.hidden_size, config.r, len(config.parts)
    made: list[list[Edit | None]] = [[] for _ in range(parts)]
    for index, block in enumerate(architecture.layers):
        if not config.edits(index):
            for layers in made:
                layers.append(None)
            continue
        prefix = f"{ROOT}{block.name}.{CHILD}.reft_"
        rotation = tensors.take(f"{prefix}rotation", (parts, width, r))
        source = tensors.take(f"{prefix}source", (parts, r, width))
        bias = tensors.take(f"{prefix}bias", (parts, r))
        for layers, *part in zip(made, rotation, source, bias, strict=True):
            layers.append(make_edit(config.direct, *part))
    ends = zip(config.parts, made, strict=True)
    return Adapter(edits=tuple(Edits(first, last, tuple(layers)) for (first, last), layers in ends))


register(ReftConfig, ReftModel, "loreft")

METHOD = Method(
    name="loreft",
    title="LoReFT, and DiReFT with direct",
    source="Wu et al. 2024, arXiv 2404.03592",
    equation="h ← h + Rᵀ(W h + b − R h) at a prompt's first and last tokens",
    build=_build,
    readers=(Reader(ReftConfig.kind, _read),),
    mergeable=False,
    identity_at_init=False,
    conditions_on_prompt=True,
)
