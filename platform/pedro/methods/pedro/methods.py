"""PEDRO, its variants and PARA as methods: names, options, capabilities."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pedro.methods.architectures import projection_paths
from pedro.methods.method import Method
from pedro.methods.options import expect, names_in
from pedro.methods.pedro.config import INIT_STD, PROMPT, PedroConfig, variant_options
from pedro.methods.pedro.model import PedroModel
from pedro.methods.pedro.reader import READER
from pedro.methods.peft_registration import register

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig

B_UP = (".pedro_bias.",)
PAPER = "Zhu et al. 2024, arXiv 2409.17834"


def _build(  # noqa: PLR0913 - options
    variant: int | None,
    model_config: ModelConfig,
    *,
    r: int | list[int] | None = None,
    targets: list[str] | None = None,
    activation: str | list[str] | None = None,
    orders: list[int] | list[list[int]] | None = None,
    pool: str | None = None,
    pool_source: str | None = None,
    window: int | None = None,
    apply_to: str | None = None,
    tail: int | None = None,
    conditioning: str | None = None,
    head_end: list[int] | None = None,
    group_size: int | str | None = None,
    init_std: float | str | None = None,
) -> PedroConfig:
    given = {
        "r": r,
        "targets": targets,
        "activation": activation,
        "orders": orders,
        "pool": pool,
        "pool_source": pool_source,
        "window": window,
        "apply_to": apply_to,
        "tail": tail,
        "conditioning": conditioning,
        "head_end": head_end,
        "group_size": group_size,
        "init_std": init_std,
    }
    changes = variant_options(variant, model_config.num_hidden_layers) if variant else {}
    return _checked(PedroConfig(**{**changes, **{k: v for k, v in given.items() if v is not None}}), model_config)


def _build_para(
    model_config: ModelConfig,
    *,
    r: int = 12,
    targets: list[str] | tuple[str, ...] = ("q", "v", "up"),
    activation: str = "gelu",
    pool: str = "last",
    conditioning: str = PROMPT,
    head_end: list[int] | None = None,
    init_std: float | str = INIT_STD,
) -> PedroConfig:
    expect(activation in ("gelu", "relu"), "activation", "gelu or relu (PARA's is fixed)", activation)
    return _checked(
        PedroConfig(
            r=r,
            targets=names_in("targets", targets),
            activation=activation,
            pool=pool,
            conditioning=conditioning,
            head_end=head_end,  # type: ignore[arg-type]  # a list becomes a tuple there
            init_std=init_std,
        ),
        model_config,
    )


def _checked(config: PedroConfig, model_config: ModelConfig) -> PedroConfig:
    paths = projection_paths(model_config)
    missing = [target for target in config.targets if target not in paths]
    expect(not missing, "targets", f"names that {model_config.model_type} has ({', '.join(paths)})", missing)
    config.by_layer(model_config.num_hidden_layers)
    most = model_config.vocab_size - 1
    expect(max(config.head_end or [0]) <= most, "head_end", f"token ids from 0 to {most:,}", config.head_end)
    return config


def _entry(variant: int | None, title: str) -> Method:
    return Method(
        name=f"pedro-{variant}" if variant else "pedro",
        title=title,
        source=PAPER,
        equation="y ← l ⊙ y, l = R(pool(x) W_down) W_up + b",
        build=partial(_build, variant),
        readers=(READER,),
        mergeable=False,
        identity_at_init=True,
        conditions_on_prompt=True,
        theta=(".pedro_a.", ".pedro_b."),
        b_up=B_UP,
    )


register(PedroConfig, PedroModel, "pedro")

METHODS = (
    _entry(None, "PEDRO"),
    _entry(1, "PEDRO-1: mean pooling"),
    _entry(2, "PEDRO-2: max pooling"),
    _entry(3, "PEDRO-3: q, k, v, gate and up, r = 8"),
    _entry(4, "PEDRO-4: q and v, r = 24"),
    _entry(5, "PEDRO-5: ReLU"),
    _entry(6, "PEDRO-6: GELU"),
    _entry(7, "PEDRO-7: ReLU in the first half of the layers, GELU in the rest"),
    Method(
        name="para",
        title="PARA",
        source="arXiv 2502.01033",
        equation="PEDRO's with a fixed activation (as we understand it: PEDRO-6)",
        build=_build_para,
        readers=(READER,),
        mergeable=False,
        identity_at_init=True,
        conditions_on_prompt=True,
        b_up=B_UP,
    ),
)
