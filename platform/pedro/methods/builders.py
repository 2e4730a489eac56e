"""How each method's options become a PEFT config, one function a method. Knows nothing of models or training.

A builder's keyword-only arguments are the options, and their defaults the method's. Each raises ConfigError for a
value that the backbone or the method cannot take, BackboneError for an unsupported architecture.
"""

from __future__ import annotations

from typing import Any

from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig

from pedro.errors import ConfigError
from pedro.methods.architectures import projection_paths
from pedro.methods.bottleneck import LEARNED, BottleneckConfig
from pedro.methods.constants.config import ConstantConfig
from pedro.methods.late_prompt import LatePromptConfig
from pedro.methods.pedro.config import PedroConfig, variant_options
from pedro.methods.sparse_search import SparseSearchConfig

UNKNOWN_STEPS = 1_000_000_000  # AdaLoRA's config wants a number early; its companion sets the real one
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


def adalora(
    model_config: Any,
    *,
    r: int = 8,
    target_r: int = 4,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Targets = None,
    start: float = 0.1,
    end: float = 0.5,
    orthogonality: float = 0.1,
) -> AdaLoraConfig:
    """`start` and `end`: shares of the steps between which ranks are pruned, read by the method's companion."""
    _expect_count("r", r)
    _expect_count("target_r", target_r)
    _expect(target_r <= r, "target_r", f"at most r = {r}", target_r)
    _expect_count("alpha", alpha)
    _expect_share("dropout", dropout)
    _expect_share("start", start)
    _expect_share("end", end)
    _expect(start < end, "end", f"more than start = {start}", end)
    good = isinstance(orthogonality, (int, float)) and orthogonality >= 0
    _expect(good, "orthogonality", "a number >= 0", orthogonality)
    return AdaLoraConfig(
        init_r=r,
        target_r=target_r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        orth_reg_weight=orthogonality,
        total_step=UNKNOWN_STEPS,
        target_modules=_paths(model_config, targets),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def ssp(
    model_config: Any,
    *,
    r: int = 8,
    alpha: int = 16,
    targets: Targets = None,
    budget: float = 0.4,
    search: float = 0.5,
) -> SparseSearchConfig:
    return SparseSearchConfig(r=r, alpha=alpha, targets=_targets(model_config, targets), budget=budget, search=search)


def houlsby(model_config: Any, *, r: int = 18, activation: str = "gelu") -> BottleneckConfig:
    projection_paths(model_config)
    return BottleneckConfig(r=r, activation=activation)


def learned_adapter(model_config: Any, *, r: int = 36) -> BottleneckConfig:
    projection_paths(model_config)
    return BottleneckConfig(r=r, sites=("mlp",), activation=LEARNED)


def p_tuning_v2(model_config: Any, *, tokens: int = 64) -> PrefixTuningConfig:
    _expect_count("tokens", tokens)
    projection_paths(model_config)
    return PrefixTuningConfig(num_virtual_tokens=tokens)


def lpt(model_config: Any, *, r: int = 1024, tokens: int = 64, layer: int | None = None) -> LatePromptConfig:
    projection_paths(model_config)
    config = LatePromptConfig(r=r, tokens=tokens, layer=layer)
    config.place(model_config.num_hidden_layers)
    return config


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
