"""Late prompt tuning as a PEFT tuner (LPT, Liu et al. 2022, arXiv 2210.11292).

Before a middle layer, soft tokens are put in front of the sequence. A generator makes them from the prompt's hidden
states there (section 4.2, with max pooling): each token through W_down, the prompt pooled to as many pieces as there
are soft tokens, then ReLU and W_up. From that layer on the sequence is longer, in the KV cache as well; the last layer
takes the soft tokens off again. They stand at the positions before the row's first token.
Shapes: B rows, T tokens of this call, P soft tokens, D model width, R bottleneck.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from pedro.errors import BackboneError, ConfigError
from pedro.methods.architectures import Architecture, projection_paths
from pedro.methods.blocks import BlockLayer, TunerConfig
from pedro.methods.conditioned import ConditionedTuner
from pedro.methods.method import Method
from pedro.methods.options import expect_count
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.methods.packing import Packing
    from pedro.methods.prompt import PromptPass
    from pedro.model_protocols import ModelConfig

CHILD = "prompts"
INIT_STD = 0.02
CACHES = ("past_key_values", "layer_past")  # what blocks call their KV cache


@dataclass
class LatePromptConfig(TunerConfig):
    """Options of late prompt tuning. Raises ConfigError for a value that no model could take."""

    kind: ClassVar[str] = "LATE_PROMPT"

    r: int = field(default=1024, metadata={"help": "Width of the generator's bottleneck."})
    tokens: int = field(default=64, metadata={"help": "Number of soft tokens."})
    layer: int | None = field(
        default=None, metadata={"help": "The layer that reads them first, from 1; None: the middle one."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_count("r", self.r)
        expect_count("tokens", self.tokens)
        if self.layer is not None:
            expect_count("layer", self.layer)

    def first_layer(self, num_layers: int) -> int:
        """Index of the layer that reads the soft tokens first. Raises ConfigError where there is no such layer."""
        layer = max(1, num_layers // 2) if self.layer is None else self.layer
        if layer >= num_layers:
            raise ConfigError(f"layer: expected 1 to {num_layers - 1}, the backbone's last, got {layer}", param="layer")
        return layer


class LatePromptLayer(BlockLayer):
    """The generator at one block, and the hooks on it and on all blocks after it."""

    adapter_layer_names = (
        "late_prompt_down",  # [D, R]
        "late_prompt_down_bias",  # [R]
        "late_prompt_up",  # [R, D]
        "late_prompt_up_bias",  # [D]
    )
    late_prompt_down: nn.ParameterDict
    late_prompt_down_bias: nn.ParameterDict
    late_prompt_up: nn.ParameterDict
    late_prompt_up_bias: nn.ParameterDict

    def __init__(self, index: int, architecture: Architecture, prompts: PromptPass) -> None:
        super().__init__(index, architecture.layers[index])
        self.width, self.prompts = architecture.hidden_size, prompts
        self._rotary = [getattr(architecture.decoder, "rotary_emb", None)]  # in a list, so as not to become ours
        blocks = [parts.block for parts in architecture.layers[index:]]
        self._numbers = {id(block): index + i for i, block in enumerate(blocks)}
        self._added = 0  # soft tokens in this pass
        self._packing: Packing | None = None  # of the rows with them, where it is packed
        self._handles = [block.register_forward_pre_hook(self._before_block, with_kwargs=True) for block in blocks]
        self._handles.append(blocks[-1].register_forward_hook(self._after_last))

    def update_layer(self, adapter_name: str, config: LatePromptConfig) -> None:
        """Add a fresh adapter with small random weights."""
        fresh = self.fresh()
        down = torch.empty(self.width, config.r, **fresh).normal_(std=INIT_STD)
        up = torch.empty(config.r, self.width, **fresh).normal_(std=INIT_STD)
        self.late_prompt_down[adapter_name] = nn.Parameter(down)
        self.late_prompt_down_bias[adapter_name] = nn.Parameter(torch.zeros(config.r, **fresh))
        self.late_prompt_up[adapter_name] = nn.Parameter(up)
        self.late_prompt_up_bias[adapter_name] = nn.Parameter(torch.zeros(self.width, **fresh))
        self.configs[adapter_name] = config

    def forward(self, hidden: torch.Tensor, prompt: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The soft tokens [B, P, D] of the rows' prompts: hidden [B, T, D], prompt [B, T] bool."""
        narrow = hidden.float() @ self.late_prompt_down[adapter_name] + self.late_prompt_down_bias[adapter_name]
        count = self.configs[adapter_name].tokens
        pieces = [functional.adaptive_max_pool1d(row[own].T, count).T for row, own in zip(narrow, prompt, strict=True)]
        pooled = functional.relu(torch.stack(pieces))  # [B, P, R]
        prompts: torch.Tensor = pooled @ self.late_prompt_up[adapter_name] + self.late_prompt_up_bias[adapter_name]
        return prompts

    def _before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.live():
            return None
        names = list(inspect.signature(block.forward).parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, first = given.pop(names[0]), block is self.layer_sites.block
        prompt = self.prompts.read() if first else self.prompts.prompt
        if prompt is None:  # decoding: the soft tokens lie in this layer's cache
            cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
            assert cache is not None, "decoding without a cache"
            behind = cache.get_seq_length(self._numbers[id(block)]) - (cache.get_seq_length(0) - hidden.shape[1])
            given["attention_mask"] = extend_mask(given.get("attention_mask"), behind, rows=False)
            return (hidden,), given
        if first:
            (name,), packing = self.live()[:1], self.prompts.packing
            hidden = self._rows(hidden)
            soft = self(hidden, prompt.to(hidden.device), name)
            self._added = soft.shape[1]
            self._packing = None if packing is None else packing.lengthened(self._added)
            hidden = self._packed(torch.cat([soft.to(hidden.dtype), hidden], dim=1))
        given["attention_mask"] = extend_mask(given.get("attention_mask"), self._added, rows=True)
        self._extend_positions(given, hidden)
        if self._packing is not None:
            given["packing"] = self._packing
        return (hidden,), given

    def _packed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, P + T, …] as the pass is laid out behind the soft tokens."""
        return tokens if self._packing is None else self._packing.pack(tokens)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, T, …] of what came as the pass is laid out before them."""
        return tokens if self.prompts.packing is None else self.prompts.packing.pad(tokens)

    def _extend_positions(self, given: dict[str, Any], hidden: torch.Tensor) -> None:
        """Positions before the row's first token for the soft tokens, and their rotations where there are any."""
        positions = given.get("position_ids")
        if positions is None:
            return
        prompt, positions = self.prompts.prompt, self._rows(positions)
        assert prompt is not None, "called while the prompt is read"
        first = prompt.to(positions.device).int().argmax(dim=1)  # [B], the first attended token
        start = positions.expand(len(first), -1).gather(1, first[:, None])  # [B, 1]
        before = start - self._added + torch.arange(self._added, device=positions.device)
        given["position_ids"] = self._packed(torch.cat([before, positions.expand(len(first), -1)], dim=1))
        rotary, turned = self._rotary[0], given.get("position_embeddings")
        if turned is not None and rotary is not None:
            soft = rotary(hidden, position_ids=before)
            given["position_embeddings"] = tuple(
                self._packed(torch.cat([s, self._rows(t).expand(len(s), -1, -1)], dim=1))
                for s, t in zip(soft, turned, strict=True)
            )

    def _after_last(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        added, wide, packing = self._added, self._packing, self.prompts.packing
        self._added, self._packing = 0, None
        if not added:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if wide is None or packing is None:
            hidden = hidden[:, added:]
        else:
            hidden = packing.pack(wide.pad(hidden)[:, added:])
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def extend_mask(mask: torch.Tensor | None, count: int, rows: bool) -> torch.Tensor | None:
    """A mask [B, 1, T, S], bool or additive, with `count` keys in front that every query sees.

    With `rows`, also `count` queries in front that see each other causally and nothing else. None stays None: causal.
    """
    if mask is None or not count:
        return mask
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise ConfigError(
            "method: late prompt tuning needs sdpa or eager attention; load the backbone with "
            'attn_implementation="sdpa"',
            param="method",
        )
    seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    wide = functional.pad(mask, (count, 0), value=seen)
    if not rows:
        return wide
    above = mask.new_full((count, wide.shape[-1]), hidden)
    causal = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
    above[:, :count].masked_fill_(causal, seen)
    return torch.cat([above.expand(*wide.shape[:2], -1, -1), wide], dim=2)


class LatePromptModel(ConditionedTuner):
    """The tuner that PEFT builds for a LatePromptConfig. One adapter acts at a time."""

    prefix = "late_prompt_"
    tuner_layer_cls = LatePromptLayer
    child = CHILD
    title = "late prompt tuning"
    packs = True
    no_merge = "soft tokens depend on the prompt, so no weights can hold them"

    def check(self, config: LatePromptConfig, architecture: Architecture) -> None:
        """Raise ConfigError for a layer that the backbone lacks, BackboneError for sliding windows."""
        config.first_layer(len(architecture.layers))
        backbone: Any = self.model.config
        kinds = getattr(backbone, "layer_types", None)
        if "sliding_attention" in kinds if kinds else getattr(backbone, "sliding_window", None):
            raise BackboneError(
                f"backbone: {backbone.model_type} attends in sliding windows, which late prompts would slide out of; "
                "use another method or backbone",
                param="backbone",
            )

    def add(self, block: nn.Module, index: int, adapter_name: str, config: LatePromptConfig) -> None:
        """Give the block a LatePromptLayer if it has none, and the layer a fresh adapter."""
        if not hasattr(block, CHILD):
            setattr(block, CHILD, LatePromptLayer(index, self._architecture, self._prompts))
        getattr(block, CHILD).update_layer(adapter_name, config)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return bool(self._blocks.get(key) == peft_config.first_layer(len(self._blocks)))


def _build(model_config: ModelConfig, *, r: int = 1024, tokens: int = 64, layer: int | None = None) -> LatePromptConfig:
    projection_paths(model_config)
    config = LatePromptConfig(r=r, tokens=tokens, layer=layer)
    config.first_layer(model_config.num_hidden_layers)
    return config


register(LatePromptConfig, LatePromptModel, "lpt")

METHOD = Method(
    name="lpt",
    title="LPT: late prompt tuning",
    source="Liu et al. 2022, arXiv 2210.11292",
    equation="H ← [relu(pool(H W_down)) W_up; H] at the middle layer",
    build=_build,
    mergeable=False,
    identity_at_init=False,
    conditions_on_prompt=True,
)
