"""Any method that PEFT has, by its type and with PEFT's own options.

`method: {peft_type: VERA, r: 64}` takes every field of PEFT's config class for that type, and PEFT's own defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft import AdaLoraConfig, PeftConfig, PeftType, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from pedro.errors import ConfigError, PedroError
from pedro.methods.adalora import UNKNOWN_STEPS, AdaLora
from pedro.methods.method import Method
from pedro.methods.options import expect
from pedro.methods.peft_registration import OWN_NAMES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pedro.methods.training_hook import TrainingHook
    from pedro.model_protocols import ModelConfig

NOT_OPTIONS = {field.name for field in dataclasses.fields(PeftConfig)}
# they want more in a batch or a model than rows of tokens: task ids, other adapters, an encoder, two models
NEED_MORE = ("POLY", "MULTITASK_PROMPT_TUNING", "XLORA", "CPT", "CARTRIDGE", "SHADOW", "SUPERTUNING")


class PeftByName(Method):
    """The method `peft`: its options are those of the config class that `peft_type` names."""

    @property
    def mixed_batches(self) -> bool | None:
        """As the type has a reader of another method, or has none."""
        return None

    def known(self, options: dict[str, Any]) -> Sequence[str]:
        """peft_type and the fields of its config class. Raises ConfigError for a type that is not to be had."""
        fields = [f.name for f in dataclasses.fields(_config_class(options.get("peft_type"))) if f.init]
        return ["peft_type", *(name for name in fields if name not in NOT_OPTIONS)]

    def _attach(self, model: nn.Module, config: PeftConfig) -> nn.Module:
        before = [(p, _checksum(p)) for p in model.parameters()]
        try:
            attached = super()._attach(model, config)
        except PedroError:
            raise
        except Exception as error:  # PEFT's methods raise whatever their formulas meet first
            raise ConfigError(
                f"method.peft_type: {config.peft_type.value} cannot be put on this backbone: {error}",  # type: ignore[union-attr]
                param="method.peft_type",
            ) from error
        same = all(_checksum(p) == checksum for p, checksum in before)
        expect(same, "peft_type", "options that leave the backbone's weights as they are", config.peft_type.value)  # type: ignore[union-attr]
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in attached.parameters() if p.requires_grad)
        expect(trained > 0, "peft_type", "options that leave something to train", config.peft_type.value)  # type: ignore[union-attr]
        return attached


def _build(_model_config: ModelConfig, *, peft_type: str | None = None, **options: Any) -> PeftConfig:
    """PEFT's config for a type. Raises ConfigError with PEFT's own words for a wrong value."""
    config_class = _config_class(peft_type)
    if issubclass(config_class, AdaLoraConfig):
        options = {"total_step": UNKNOWN_STEPS, **options}
    try:
        return config_class(task_type=TaskType.CAUSAL_LM, **options)
    except Exception as error:
        raise ConfigError(f"peft_type: {peft_type} refuses its options: {error}", param="peft_type") from error


def _make_hook(model: Any, steps: int, _options: dict[str, Any]) -> TrainingHook | None:
    """AdaLoRA's hook, by its own schedule, if that is the type."""
    return AdaLora(model, steps) if isinstance(model.peft_config["default"], AdaLoraConfig) else None


def peft_types() -> list[str]:
    """The types that can be had."""
    names = (kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind in PEFT_TYPE_TO_TUNER_MAPPING)
    return sorted(name for name in names if name not in NEED_MORE and name not in OWN_NAMES)


def _checksum(weight: torch.Tensor) -> float:
    """A number that changes with a weight; the same for all that have no data here."""
    return 0.0 if weight.is_meta or not weight.numel() else float(weight.detach().double().norm())


def _config_class(peft_type: Any) -> type[PeftConfig]:
    if isinstance(peft_type, str) and peft_type in OWN_NAMES:
        raise ConfigError(
            f"method.peft_type: train {peft_type} by its own name: method.name={OWN_NAMES[peft_type]}",
            param="method.peft_type",
        )
    classes = {name: PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)] for name in peft_types()}
    if not isinstance(peft_type, str) or peft_type not in classes:
        near = difflib.get_close_matches(str(peft_type), classes, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"method.peft_type: expected a type of PEFT, got {peft_type!r}; {hint}use one of {', '.join(classes)}",
            param="method.peft_type",
        )
    return classes[peft_type]


METHOD = PeftByName(
    name="peft",
    title="Any method of PEFT by its peft_type",
    source="huggingface/peft",
    equation="as peft_type says",
    build=_build,
    mergeable=None,
    identity_at_init=None,
    make_hook=_make_hook,
)
