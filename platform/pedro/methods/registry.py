"""Every method that can be trained, by name: one entry each. Knows nothing of data, optimizers or files.

All methods take the same forward call, `prompt_lens` and `prompt_mask` included; those that do not condition on the
prompt ignore the two.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from pedro.errors import ConfigError
from pedro.methods.architectures import projection_paths
from pedro.methods.pedro.config import PedroConfig, variant_options
from pedro.methods.pedro.prompt import PROMPT_ARGUMENTS

Parameters = list[tuple[str, nn.Parameter]]
PEDRO_PAPER = "Zhu et al. 2024, arXiv 2409.17834"
THETA = (".pedro_a.", ".pedro_b.")


@dataclass(frozen=True)
class Method:
    """One way to fine-tune a backbone, and what can be done with the result.

    `build(model_config, **options)` makes the PEFT config, or None to train the backbone itself; its keyword-only
    arguments are the method's options and their defaults.
    """

    name: str
    title: str
    source: str
    build: Callable[..., PeftConfig | None]
    engine: bool  # served in batches that mix adapters
    mergeable: bool  # can be folded into the backbone's weights
    identity_at_init: bool  # a fresh adapter changes nothing
    conditions_on_prompt: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The options that the method takes, with their defaults."""
        named = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY}

    def config(self, model_config: Any, options: dict[str, Any] | None = None) -> PeftConfig | None:
        """The PEFT config for a backbone's config. Raises ConfigError for an unknown option or a wrong value."""
        options = dict(options or {})
        if unknown := [name for name in options if name not in self.options]:
            raise ConfigError("; ".join(map(self._explain_unknown, unknown)), param=f"method.{unknown[0]}")
        try:
            config = self.build(model_config, **options)
        except ConfigError as error:
            raise ConfigError(f"method.{error.message}", param=f"method.{error.param}") from error
        if config is not None:
            config.task_type = TaskType.CAUSAL_LM
        return config

    def apply(self, model: nn.Module, options: dict[str, Any] | None = None) -> nn.Module:
        """A fresh adapter named "default" on `model`, in float32 whatever the backbone's dtype; for `full`, the model.

        Raises ConfigError for options that do not fit, BackboneError for an unsupported architecture.
        """
        config = self.config(model.config, options)
        if config is None:
            return self.wrap(model.requires_grad_(True))
        return self.wrap(get_peft_model(model, config))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Make `model` accept and ignore `prompt_lens` and `prompt_mask`, where the method has no use for them."""
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        if not self.conditions_on_prompt and _ignore_prompt not in inner._forward_pre_hooks.values():
            inner.register_forward_pre_hook(_ignore_prompt, with_kwargs=True)
        return model

    def parameter_groups(self, model: nn.Module) -> tuple[Parameters, Parameters]:
        """The trainable parameters as (omega, theta): theta is all a and b of eq. 7, omega the rest (eq. 8)."""
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        theta = [(name, p) for name, p in trainable if _is_theta(name)]
        return [(name, p) for name, p in trainable if not _is_theta(name)], theta

    def _explain_unknown(self, option: str) -> str:
        near = difflib.get_close_matches(option, self.options, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        valid = f"{self.name} takes {', '.join(self.options)}" if self.options else f"{self.name} takes no options"
        return f"method.{option}: unknown option; {hint}{valid}"


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: trainable, trainable without bias vectors (as the paper counts), and total."""
    sizes = [(name, p.requires_grad, getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()]
    return {
        "trainable": sum(size for _, trained, size in sizes if trained),
        "trainable_without_bias": sum(size for name, trained, size in sizes if trained and not _is_bias(name)),
        "total": sum(size for _, _, size in sizes),
    }


def get_method(name: str) -> Method:
    """The method called `name`. Raises ConfigError with a suggestion for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"method.name: unknown method {name!r}; {hint}use one of {', '.join(METHODS)}", param="method"
        )
    return METHODS[name]


def _is_theta(name: str) -> bool:
    return any(part in f"{name}." for part in THETA)


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") or ".pedro_bias." in f"{name}."


def _ignore_prompt(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {name: value for name, value in kwargs.items() if name not in PROMPT_ARGUMENTS}


# The entries. A builder's keyword-only arguments are the options; defaults of a variant come from the paper.


def _pedro(
    variant: int | None,
    model_config: Any,
    *,
    r: int | None = None,
    targets: list[str] | None = None,
    activation: str | list[str] | None = None,
    orders: list[int] | None = None,
    pool: str | None = None,
    pool_source: str | None = None,
) -> PedroConfig:
    given = {
        "r": r,
        "targets": targets,
        "activation": activation,
        "orders": orders,
        "pool": pool,
        "pool_source": pool_source,
    }
    changes = variant_options(variant, model_config.num_hidden_layers) if variant else {}
    return _checked(PedroConfig(**{**changes, **{k: v for k, v in given.items() if v is not None}}), model_config)


def _para(
    model_config: Any,
    *,
    r: int = 12,
    targets: list[str] | tuple[str, ...] = ("q", "v", "up"),
    activation: str = "gelu",
    pool: str = "last",
) -> PedroConfig:
    if activation not in ("gelu", "relu"):
        raise ConfigError(
            f"activation: expected gelu or relu (PARA's is fixed), got {activation!r}", param="activation"
        )
    return _checked(PedroConfig(r=r, targets=tuple(targets), activation=activation, pool=pool), model_config)


def _lora(
    model_config: Any,
    *,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: list[str] | None = None,
) -> LoraConfig:
    _expect(isinstance(r, int) and r > 0, "r", "a whole number > 0", r)
    _expect(isinstance(alpha, int) and alpha > 0, "alpha", "a whole number > 0", alpha)
    _expect(isinstance(dropout, (int, float)) and 0 <= dropout < 1, "dropout", "a number in [0, 1)", dropout)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_paths(model_config, targets),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def _ia3(model_config: Any) -> IA3Config:
    return IA3Config(
        target_modules=_paths(model_config, ["k", "v", "down"]),
        feedforward_modules=_paths(model_config, ["down"]),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def _full(model_config: Any) -> None:
    return None


def _checked(config: PedroConfig, model_config: Any) -> PedroConfig:
    paths = projection_paths(model_config)
    missing = [target for target in config.targets if target not in paths]
    _expect(not missing, "targets", f"names that {model_config.model_type} has ({', '.join(paths)})", missing)
    config.activations(model_config.num_hidden_layers)
    return config


def _paths(model_config: Any, targets: list[str] | None) -> list[str]:
    paths = projection_paths(model_config)
    targets = list(paths) if targets is None else targets
    good = isinstance(targets, (list, tuple)) and len(targets) > 0 and all(target in paths for target in targets)
    _expect(good, "targets", f"a list of {', '.join(paths)}", targets)
    return sorted({paths[target] for target in targets})


def _expect(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}", param=name)


def _pedro_entry(variant: int | None, title: str) -> Method:
    name = f"pedro-{variant}" if variant else "pedro"
    return Method(name, title, PEDRO_PAPER, partial(_pedro, variant), True, False, True, conditions_on_prompt=True)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _pedro_entry(None, "PEDRO"),
        _pedro_entry(1, "PEDRO-1: mean pooling"),
        _pedro_entry(2, "PEDRO-2: max pooling"),
        _pedro_entry(3, "PEDRO-3: q, k, v, gate and up, r = 8"),
        _pedro_entry(4, "PEDRO-4: q and v, r = 24"),
        _pedro_entry(5, "PEDRO-5: ReLU"),
        _pedro_entry(6, "PEDRO-6: GELU"),
        _pedro_entry(7, "PEDRO-7: ReLU in the first half of the layers, GELU in the rest"),
        Method("para", "PARA", "arXiv 2502.01033", _para, True, False, True, conditions_on_prompt=True),
        Method("lora", "LoRA", "Hu et al. 2021, arXiv 2106.09685", _lora, False, True, True),
        Method("ia3", "(IA)³", "Liu et al. 2022, arXiv 2205.05638", _ia3, False, True, True),
        Method("full", "Full fine-tuning", "every weight of the backbone", _full, False, True, True),
    )
}
