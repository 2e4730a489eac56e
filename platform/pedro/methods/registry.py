"""Every method that can be trained, by name: one line each.

A method is one file: its config, layer and tuner where PEFT has none, its options, how its adapters are read for the
engine, and a `Method` that says what it can do. Its line here makes it known to training, serving, tables and the
command line.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING

from pedro.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from pedro.methods.method import Method

MODULES = (  # of this package, in the order of every table; each holds a METHOD, or METHODS
    "pedro.methods",
    "lora",
    "constants.methods",
    "adalora",
    "sparse_search",
    "bottleneck",
    "p_tuning_v2",
    "late_prompt",
    "reft",
    "low_rank.melora",
    "low_rank.lora_dash",
    "low_rank.lorta",
    "miss",
    "low_rank.gift",
    "ether",
    "sibo",
    "mode",
    "loretta",
    "by_name",
    "full",
)


def _methods_in(name: str) -> tuple[Method, ...]:
    module = import_module(f"pedro.methods.{name}")
    return getattr(module, "METHODS", None) or (module.METHOD,)


METHODS: dict[str, Method] = {method.name: method for name in MODULES for method in _methods_in(name)}


def get_method(name: str) -> Method:
    """The method called `name`. Raises ConfigError with a suggestion for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"method.name: unknown method {name!r}; {hint}use one of {', '.join(METHODS)}", param="method"
        )
    return METHODS[name]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: trainable, trainable without bias vectors (as the paper counts), and total."""
    sizes = [(name, p.requires_grad, getattr(p, "ds_numel", p.numel())) for name, p in model.named_parameters()]
    return {
        "trainable": sum(size for _, trained, size in sizes if trained),
        "trainable_without_bias": sum(size for name, trained, size in sizes if trained and not _is_bias(name)),
        "total": sum(size for _, _, size in sizes),
    }


def _is_bias(name: str) -> bool:
    return any(part.endswith("bias") for part in name.split("."))
