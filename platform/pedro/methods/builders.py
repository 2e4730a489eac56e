"""How each method's options become a PEFT config, one function a method. Knows nothing of models or training.

A builder's keyword-only arguments are the options, and their defaults the method's. Each raises ConfigError for a
value that the backbone or the method cannot take, BackboneError for an unsupported architecture.
"""

from __future__ import annotations

from typing import Any

from peft import IA3Config, LoraConfig

from pedro.errors import ConfigError
from pedro.methods.architectures import projection_paths
from pedro.methods.constants.config import ConstantConfig
from pedro.methods.pedro.config import PedroConfig, variant_options

Targets = list[str] | tuple[str, ...] | None


def pedro(
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


def para(
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


def lora(
    model_config: Any, *, r: int = 8, alpha: int = 16, dropout: float = 0.0, targets: Targets = None
) -> LoraConfig:
    _expect_count("r", r)
    _expect_count("alpha", alpha)
    _expect_share("dropout", dropout)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_paths(model_config, targets),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def ia3(model_config: Any, *, r: int | None = None) -> IA3Config | ConstantConfig:
    if r is not None:
        projection_paths(model_config)
        return ConstantConfig(scale=("k", "v", "up"), r=r)
    return IA3Config(
        target_modules=_paths(model_config, ["k", "v", "down"]),
        feedforward_modules=_paths(model_config, ["down"]),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def bitfit(model_config: Any, *, r: int | None = None, targets: Targets = None) -> ConstantConfig:
    return ConstantConfig(shift=_targets(model_config, targets), r=r)


def red(model_config: Any) -> ConstantConfig:
    projection_paths(model_config)
    return ConstantConfig(scale=("down",), shift=("down",))


def full(model_config: Any) -> None:
    return None


def _checked(config: PedroConfig, model_config: Any) -> PedroConfig:
    paths = projection_paths(model_config)
    missing = [target for target in config.targets if target not in paths]
    _expect(not missing, "targets", f"names that {model_config.model_type} has ({', '.join(paths)})", missing)
    config.activations(model_config.num_hidden_layers)
    return config


def _targets(model_config: Any, targets: Targets) -> tuple[str, ...]:
    """`targets`, or all linears of the backbone."""
    paths = projection_paths(model_config)
    targets = tuple(paths) if targets is None else targets
    good = isinstance(targets, (list, tuple)) and len(targets) > 0 and all(target in paths for target in targets)
    _expect(good, "targets", f"a list of {', '.join(paths)}", targets)
    return tuple(targets)


def _paths(model_config: Any, targets: Targets) -> list[str]:
    paths = projection_paths(model_config)
    return sorted({paths[target] for target in _targets(model_config, targets)})


def _expect_count(name: str, value: object) -> None:
    _expect(isinstance(value, int) and not isinstance(value, bool) and value > 0, name, "a whole number > 0", value)


def _expect_share(name: str, value: object) -> None:
    _expect(isinstance(value, (int, float)) and 0 <= value < 1, name, "a number in [0, 1)", value)


def _expect(good: bool, name: str, expected: str, got: object) -> None:
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}", param=name)
