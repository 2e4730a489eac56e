"""What our PEFT tuners share: one layer object as a child of each decoder block, hooks instead of replaced modules.

A method gives a `TunerConfig`, a `BlockLayer` (parameters by adapter name, hooks on the
block's modules) and a `BlockTuner` that says under which name the layer hangs in the block. The child's name must not
start with the tuner's prefix: transformers' `load_adapter` would misplace the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from pedro.errors import ConfigError
from pedro.methods.architectures import Architecture, LayerSites, describe

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


@dataclass
class TunerConfig(PeftConfig):
    """The config of one of our methods: `kind` is its `peft_type`, and its tuner's prefix in lower case."""

    kind: ClassVar[str]

    target_modules = None  # no field: PEFT reads it, but blocks are found by the table of architectures

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(self.kind)


class BlockLayer(nn.Module, BaseTunerLayer):
    """One block's share of a method; parameters are float32 whatever the backbone's dtype.

    A subclass names its ParameterDicts in `adapter_layer_names` and sets `_handles` to its hooks.
    """

    other_param_names: tuple[str, ...] = ("configs",)
    weight = bias = None  # type: ignore[assignment]  # PEFT's own look for a wrapped layer, and there is none

    def __init__(self, index: int, layer_sites: LayerSites) -> None:
        super().__init__()
        self.index = index
        self.layer_sites = layer_sites  # a plain record, so that the block's modules do not become ours
        self.configs: dict[str, Any] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._handles: list[RemovableHandle] = []

    def live(self) -> list[str]:
        """The adapters that act in this block now."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]

    def fresh(self) -> dict[str, Any]:
        """dtype and device of a new parameter."""
        return {"dtype": torch.float32, "device": next(self.layer_sites.norm.parameters()).device}

    def unhook(self) -> None:
        """Leave the block as it was."""
        for handle in self._handles:
            handle.remove()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the block's device, as PEFT asks after loading; unlike PEFT's own, never to the block's dtype."""
        device = device or next(self.layer_sites.norm.parameters()).device
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name] = parameters[adapter_name].to(device)


class BlockTuner(BaseTuner):
    """Puts a layer into each block, and takes it out.

    Raises BackboneError for an unsupported architecture, ConfigError for options that do not fit the backbone, both
    before anything is changed.
    """

    child: ClassVar[str]  # the layer's name in its block
    no_merge: ClassVar[str]  # why no weights can hold such an adapter
    packs: ClassVar[bool] = False  # acts token by token, or knows packed passes (packing.py)
    shares_beginnings: ClassVar[bool] = False  # whatever follows, it makes the same of a row's beginning
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own declaration

    def check(self, config: Any, architecture: Architecture) -> None:
        """Raise ConfigError for options that this backbone cannot take."""

    def add(self, block: nn.Module, index: int, adapter_name: str, config: Any) -> None:
        """Give the block a layer if it has none, and the layer a fresh adapter."""
        raise NotImplementedError

    def layers(self) -> Iterator[Any]:
        """The blocks' layers, in order."""
        for parts in self._architecture.layers:
            if hasattr(parts.block, self.child):
                yield getattr(parts.block, self.child)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._architecture: Architecture = describe(model)
        self._blocks = {parts.name: index for index, parts in enumerate(self._architecture.layers)}
        self.check(peft_config, self._architecture)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._blocks

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self.add(target, self._blocks[current_key], adapter_name, peft_config)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge_allowed()
        for parts in self._architecture.layers:
            if hasattr(parts.block, self.child):
                getattr(parts.block, self.child).unhook()
                delattr(parts.block, self.child)
        del self.model.peft_config
        return self.model

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises ConfigError."""
        self._check_merge_allowed()

    def _check_merge_allowed(self) -> None:
        raise ConfigError(f"merge: {self.no_merge}; keep the adapter")
