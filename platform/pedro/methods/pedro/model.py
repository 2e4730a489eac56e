"""PEDRO as a PEFT tuner: puts a PedroLayer into each block, and takes it out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError
from pedro.methods.architectures import Architecture, head_width
from pedro.methods.conditioned import ConditionedTuner
from pedro.methods.pedro.config import HEAD, PedroConfig
from pedro.methods.pedro.layer import BASE, PedroLayer

if TYPE_CHECKING:
    from torch import nn

CHILD = "modulation"


class PedroModel(ConditionedTuner):
    """The tuner that PEFT's get_peft_model, PeftModel and transformers' load_adapter build for a PedroConfig."""

    prefix = "pedro_"
    tuner_layer_cls = PedroLayer
    child = CHILD
    title = "PEDRO"
    packs = True
    no_merge = "PEDRO's vectors depend on the prompt, so no weights can hold them"

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.group_size == HEAD:
            peft_config.group_size = head_width(self.model.config)
        return peft_config

    def check(self, config: PedroConfig, architecture: Architecture) -> None:
        """Raise ConfigError for targets that the backbone lacks, for lists of another length than it has layers, and
        for groups that do not divide its projections."""
        sites = architecture.layers[0].sites
        if missing := [target for target in config.targets if target not in sites]:
            raise ConfigError(
                f"targets: this backbone has no {', '.join(missing)}; choose from {', '.join(sites)}", param="targets"
            )
        config.by_layer(len(architecture.layers))
        config.entries([sites[target].width for target in config.targets])

    def add(self, block: nn.Module, index: int, adapter_name: str, config: PedroConfig) -> None:
        """Give the block a PedroLayer if it has none, and the layer a fresh adapter."""
        layers = self._architecture.layers
        if not hasattr(block, CHILD):
            setattr(block, CHILD, PedroLayer(index, layers[index], self._architecture.hidden_size, self._prompts))
        getattr(block, CHILD).update_layer(adapter_name, config, len(layers))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: `adapter_names`, one a row, "__base__" for none; repeated for beams and returned sequences."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if unknown := sorted(set(names) - set(self.peft_config) - {BASE}):
            raise ConfigError(
                f"adapter_names: no adapter {', '.join(unknown)}; loaded are {', '.join(self.peft_config)}",
                param="adapter_names",
            )
        copies = max(_option("num_beams", kwargs) or 1, _option("num_return_sequences", kwargs) or 1)
        self._prompts.adapter_names = [name for name in names for _ in range(copies)]
        try:
            yield
        finally:
            self._prompts.adapter_names = None


def _option(name: str, kwargs: dict[str, Any]) -> Any:
    """A generation option, given by itself or in a generation_config."""
    return kwargs[name] if kwargs.get(name) is not None else getattr(kwargs.get("generation_config"), name, None)
