"""Every method that can be trained, by name: one line each. Knows nothing of data, optimizers or files.

A method is one file: its config, layer and tuner where PEFT has none, its options, and a `Method` that says what it
can do. Its line here makes it known to training, tables and the command line.
"""

from __future__ import annotations

import difflib

from torch import nn

from pedro.errors import ConfigError
from pedro.methods import adalora, bottleneck, by_name, ether, late_prompt, loretta, mode, peft_own, sibo, sparse_search
from pedro.methods.constants import methods as constants
from pedro.methods.low_rank import gift, lora_dash, lorta, melora
from pedro.methods.method import Method
from pedro.methods.pedro import methods as pedro

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *pedro.METHODS,
        peft_own.LORA,
        constants.IA3,
        constants.BITFIT,
        constants.RED,
        adalora.METHOD,
        sparse_search.METHOD,
        bottleneck.HOULSBY,
        bottleneck.LEARNED_ADAPTER,
        peft_own.P_TUNING_V2,
        late_prompt.METHOD,
        melora.METHOD,
        lora_dash.METHOD,
        lorta.METHOD,
        gift.METHOD,
        ether.ETHER,
        ether.ETHER_PLUS,
        sibo.METHOD,
        mode.METHOD,
        loretta.METHOD,
        by_name.METHOD,
        peft_own.FULL,
    )
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
