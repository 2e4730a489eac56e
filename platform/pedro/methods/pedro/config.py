"""What a PEDRO adapter is: its options, their checks and the paper's variants. Knows nothing of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pedro.methods.architectures import TARGETS
from pedro.methods.blocks import TunerConfig
from pedro.methods.options import expect, expect_count, expect_names, is_count
from pedro.methods.pedro.generator import ACTIVATIONS

POOLS = ("last", "mean", "max")
POOL_SOURCES = ("normed", "residual")


@dataclass
class PedroConfig(TunerConfig):
    """Options of PEDRO (arXiv 2409.17834); PEFT saves them in adapter_config.json.

    Raises ConfigError for a value that no model could take; what depends on the model (an MLP without a gate, the
    number of layers) is checked when the adapter meets it.
    """

    kind: ClassVar[str] = "PEDRO"

    r: int = field(default=12, metadata={"help": "Width of the generator's bottleneck."})
    targets: tuple[str, ...] = field(
        default=("q", "v", "up"), metadata={"help": f"Projections whose outputs are scaled, of {', '.join(TARGETS)}."}
    )
    activation: str | tuple[str, ...] = field(
        default="rational", metadata={"help": f"One of {', '.join(ACTIVATIONS)}, or one name a layer."}
    )
    orders: tuple[int, int] = field(default=(6, 5), metadata={"help": "(m, n) of the rational activation, eq. 7."})
    pool: str = field(default="last", metadata={"help": "How the prompt becomes one vector: last, mean or max."})
    pool_source: str = field(
        default="normed", metadata={"help": "Pool after the attention's norm (normed) or before it (residual)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.targets, self.orders = _as_tuple(self.targets), _as_tuple(self.orders)
        if not isinstance(self.activation, str):
            self.activation = _as_tuple(self.activation)
        self._check()

    def _check(self) -> None:
        names = (self.activation,) if isinstance(self.activation, str) else self.activation
        expect_count("r", self.r)
        expect_names("targets", self.targets, TARGETS)
        expect(
            isinstance(names, tuple) and len(names) > 0 and all(name in ACTIVATIONS for name in names),
            "activation",
            f"one of {', '.join(ACTIVATIONS)}, or a list of one name a layer",
            self.activation,
        )
        pair = isinstance(self.orders, tuple) and len(self.orders) == 2 and all(map(is_count, self.orders))
        expect(
            pair and 1 <= self.orders[0] <= 12 and 0 <= self.orders[1] <= 12,
            "orders",
            "two whole numbers (m, n) with 1 <= m <= 12 and 0 <= n <= 12",
            self.orders,
        )
        expect(self.pool in POOLS, "pool", f"one of {', '.join(POOLS)}", self.pool)
        expect(self.pool_source in POOL_SOURCES, "pool_source", f"one of {', '.join(POOL_SOURCES)}", self.pool_source)

    def activations(self, num_layers: int) -> tuple[str, ...]:
        """One activation a layer. Raises ConfigError where a list of them has another length than the model."""
        if isinstance(self.activation, str):
            return (self.activation,) * num_layers
        expect(
            len(self.activation) == num_layers,
            "activation",
            f"one name for each of the backbone's {num_layers} layers",
            f"{len(self.activation)} names",
        )
        return self.activation

    @classmethod
    def variant(cls, number: int, num_layers: int | None = None, **options) -> PedroConfig:
        """PEDRO-1 to PEDRO-7 of the paper's ablations; `options` override them, and 7 needs `num_layers`."""
        return cls(**{**variant_options(number, num_layers), **options})


def variant_options(number: int, num_layers: int | None = None) -> dict:
    """What the paper's variant changes: -1, -2 pooling; -3, -4 targets; -5, -6, -7 the activation."""
    if number == 7:
        expect(num_layers is not None, "num_layers", "the backbone's number of layers for PEDRO-7", None)
        assert num_layers is not None
        half = num_layers // 2
        return {"activation": ("relu",) * half + ("gelu",) * (num_layers - half)}
    changes: dict[int, dict] = {
        1: {"pool": "mean"},
        2: {"pool": "max"},
        3: {"targets": TARGETS, "r": 8},
        4: {"targets": ("q", "v"), "r": 24},
        5: {"activation": "relu"},
        6: {"activation": "gelu"},
    }
    expect(number in changes, "variant", "a number from 1 to 7", number)
    return changes[number]


def _as_tuple(value):
    return tuple(value) if isinstance(value, (list, tuple)) else value
