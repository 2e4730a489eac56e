"""PEDRO as a PEFT tuner: puts a PedroLayer into each block, and takes it out. Knows nothing of training or files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from pedro.errors import ConfigError
from pedro.methods.architectures import Architecture, describe
from pedro.methods.pedro.layer import BASE, PedroLayer
from pedro.methods.pedro.prompt import PromptPass

CHILD = "modulation"  # must not start with the prefix: transformers' load_adapter would misplace the keys


class PedroModel(BaseTuner):
    """The tuner that PEFT's get_peft_model, PeftModel and transformers' load_adapter build for a PedroConfig.

    Raises BackboneError for an unsupported architecture, ConfigError for options that do not fit the backbone, both
    before anything is changed.
    """

    prefix = "pedro_"
    tuner_layer_cls = PedroLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's own declaration

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        self._architecture: Architecture = describe(model)
        sites = self._architecture.layers[0].sites
        if missing := [target for target in peft_config.targets if target not in sites]:
            raise ConfigError(
                f"targets: this backbone has no {', '.join(missing)}; choose from {', '.join(sites)}", param="targets"
            )
        self._activations = peft_config.activations(len(self._architecture.layers))
        self._blocks = {parts.name: index for index, parts in enumerate(self._architecture.layers)}
        present = next((m for m in model.modules() if isinstance(m, PedroLayer)), None)
        if present is not None:
            self._prompts = present.prompts
        else:
            self._prompts = PromptPass()
            self._prompts.attach(model)

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
        index = self._blocks[current_key]
        if not hasattr(target, CHILD):
            parts = self._architecture.layers[index]
            setattr(target, CHILD, PedroLayer(index, parts, self._architecture.hidden_size, self._prompts))
        getattr(target, CHILD).update_layer(adapter_name, peft_config, self._activations[index])

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Mixed batches: `adapter_names`, one a row, "__base__" for none; repeated for beams and returned sequences."""
        if _option("prefill_chunk_size", kwargs):
            raise ConfigError(
                "prefill_chunk_size: PEDRO reads a prompt in one piece, since its last token makes the vectors; "
                "leave it out",
                param="prefill_chunk_size",
            )
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
            getattr(parts.block, CHILD).unhook()
            delattr(parts.block, CHILD)
        self._prompts.detach()
        del self.model.peft_config
        return self.model

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Always raises ConfigError."""
        self._check_merge_allowed()

    def _check_merge_allowed(self) -> None:
        raise ConfigError("merge: PEDRO's vectors depend on the prompt, so no weights can hold them; keep the adapter")


def _option(name: str, kwargs: dict[str, Any]) -> Any:
    """A generation option, given by itself or in a generation_config."""
    return kwargs[name] if kwargs.get(name) is not None else getattr(kwargs.get("generation_config"), name, None)
