"""What a PEDRO adapter is: its options, their checks and the paper's variants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pedro.adapter_kinds.generator import ACTIVATIONS
from pedro.methods.architectures import TARGETS
from pedro.methods.blocks import TunerConfig
from pedro.methods.options import expect, expect_count, expect_names, is_count

POOLS = ("last", "mean", "max")
POOL_SOURCES = ("normed", "residual")
PROMPT, ANSWER = "prompt", "answer"
HEAD, WIDTH = "head", "width"
SYSTEM = "system"
INIT_STD = 0.02
PAPER_WIDTH = 4096  # of LLaMA-2 7B


@dataclass
class PedroConfig(TunerConfig):
    """Options of PEDRO (arXiv 2409.17834); PEFT saves them in adapter_config.json.

    Experimental: with `apply_to: answer` the prompt is read by the bare backbone, but for its last `tail` tokens, which
    are scaled as the answer is. A layer's vectors come from its input at the prompt's last token as ever, which the
    layers below have scaled: that is why the last token is always among the tail.

    Experimental, too: with `head_end` the vectors come from the prompt's head, which ends where these tokens first end,
    for instance those that a template puts behind the system message. A prompt without them is all head. Training with
    `conditioning: system` finds them: they are what the adapter's prompt format writes behind every system turn.

    Raises ConfigError for a value that no model could take; what depends on the model (an MLP without a gate, the
    number of layers) is checked when the adapter meets it.
    """

    kind: ClassVar[str] = "PEDRO"

    r: int | tuple[int, ...] = field(
        default=12, metadata={"help": "Width of the generator's bottleneck, or one width a layer."}
    )
    targets: tuple[str, ...] = field(
        default=("q", "v", "up"), metadata={"help": f"Projections whose outputs are scaled, of {', '.join(TARGETS)}."}
    )
    activation: str | tuple[str, ...] = field(
        default="rational", metadata={"help": f"One of {', '.join(ACTIVATIONS)}, or one name a layer."}
    )
    orders: tuple[int, int] | tuple[tuple[int, int], ...] = field(
        default=(6, 5), metadata={"help": "(m, n) of the rational activation, eq. 7, or one pair a layer."}
    )
    pool: str = field(default="last", metadata={"help": "How the prompt becomes one vector: last, mean or max."})
    window: int | None = field(
        default=None, metadata={"help": "How many of the prompt's last tokens are pooled; None: all of them."}
    )
    pool_source: str = field(
        default="normed", metadata={"help": "Pool after the attention's norm (normed) or before it (residual)."}
    )

    apply_to: str = field(
        default=PROMPT,
        metadata={"help": f"What is scaled: all tokens ({PROMPT}), or the prompt's tail and the answer ({ANSWER})."},
    )
    tail: int = field(
        default=1, metadata={"help": f"How many of the prompt's last tokens are scaled with apply_to: {ANSWER}."}
    )

    conditioning: str = field(
        default=PROMPT,
        metadata={"help": f"What is pooled: the {PROMPT}, or its {SYSTEM} turn, whose head_end training finds."},
    )
    head_end: tuple[int, ...] | None = field(
        default=None,
        metadata={"help": "Token ids that end a prompt's head, which alone is pooled; null: all of the prompt is."},
    )

    group_size: int | str = field(
        default=1,
        metadata={"help": f"Neighbouring channels that share one entry of a vector; {HEAD}: as many as a head has."},
    )

    init_std: float | str = field(
        default=INIT_STD,
        metadata={
            "help": f"Spread of a fresh W_down; {WIDTH}: so large that sums vary as at the paper's {PAPER_WIDTH:,}."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("targets", "orders", "r", "head_end"):
            setattr(self, name, _as_tuple(getattr(self, name)))
        if not isinstance(self.activation, str):
            self.activation = _as_tuple(self.activation)
        self._check()

    def _check(self) -> None:
        names = (self.activation,) if isinstance(self.activation, str) else self.activation
        widths = self.r if isinstance(self.r, tuple) else (self.r,)
        good = len(widths) > 0 and all(is_count(r) and r > 0 for r in widths)
        expect(good, "r", "a whole number > 0, or a list of one a layer", self.r)
        for width in widths:
            expect_count("r", width)
        expect_names("targets", self.targets, TARGETS)
        expect(
            isinstance(names, tuple) and len(names) > 0 and all(name in ACTIVATIONS for name in names),
            "activation",
            f"one of {', '.join(ACTIVATIONS)}, or a list of one name a layer",
            self.activation,
        )
        pairs = self.orders if _has_pairs(self.orders) else (self.orders,)
        expect(
            len(pairs) > 0 and all(map(_is_pair, pairs)),
            "orders",
            "two whole numbers (m, n) with 1 <= m <= 12 and 0 <= n <= 12, or a list of one pair a layer",
            self.orders,
        )
        expect(self.pool in POOLS, "pool", f"one of {', '.join(POOLS)}", self.pool)
        expect(self.pool_source in POOL_SOURCES, "pool_source", f"one of {', '.join(POOL_SOURCES)}", self.pool_source)

        window = self.window is None or (is_count(self.window) and self.window > 0)
        expect(window, "window", "a whole number of tokens > 0, or null", self.window)
        expect(
            self.window is None or self.pool != "last", "window", "null with pool: last; use pool: mean", self.window
        )
        sides = (PROMPT, ANSWER)
        expect(self.apply_to in sides, "apply_to", f"one of {', '.join(sides)}", self.apply_to)
        expect_count("tail", self.tail)
        expect(
            self.tail == 1 or self.apply_to == ANSWER, "tail", f"1 with apply_to: {PROMPT}, which has none", self.tail
        )
        parts = (PROMPT, SYSTEM)
        expect(self.conditioning in parts, "conditioning", f"one of {', '.join(parts)}", self.conditioning)
        ids = self.head_end
        good = ids is None or (isinstance(ids, tuple) and len(ids) > 0 and all(is_count(i) and i >= 0 for i in ids))
        expect(good, "head_end", "a list of one token id or more, none below 0, or null", ids)
        group = self.group_size == HEAD or (is_count(self.group_size) and self.group_size > 0)  # type: ignore[operator]
        expect(group, "group_size", f"a whole number of channels > 0, or {HEAD}", self.group_size)

        spread = isinstance(self.init_std, (int, float)) and not isinstance(self.init_std, bool) and self.init_std > 0
        expect(spread or self.init_std == WIDTH, "init_std", f"a number > 0, or {WIDTH}", self.init_std)

    @property
    def lacks_head_end(self) -> bool:
        """Whether nobody has said yet which tokens end the system turn; then it can be counted, but not run."""
        return self.conditioning == SYSTEM and self.head_end is None

    @property
    def scaled_tail(self) -> int | None:
        """How many of the prompt's last tokens are scaled; None: all of it."""
        return self.tail if self.apply_to == ANSWER else None

    def spread(self, width: int) -> float:
        """The standard deviation of a fresh W_down on a backbone of this width.

        An input of norm's size gives sums that vary as std · sqrt(width): with one std for all widths, those of a small
        backbone stay where the activation is a straight line.
        """
        if isinstance(self.init_std, str):
            return INIT_STD * math.sqrt(PAPER_WIDTH / width)
        return self.init_std

    def by_layer(self, num_layers: int) -> list[tuple[str, int, tuple[int, int]]]:
        """Activation, r and orders of each layer. Raises ConfigError where a list has another length than the model."""
        orders = self.orders if _has_pairs(self.orders) else (self.orders,) * num_layers
        ranks = self.r if isinstance(self.r, tuple) else (self.r,) * num_layers
        names = (self.activation,) * num_layers if isinstance(self.activation, str) else self.activation
        for option, values, each in (("activation", names, "name"), ("r", ranks, "width"), ("orders", orders, "pair")):
            expect(
                len(values) == num_layers,
                option,
                f"one {each} for each of the backbone's {num_layers} layers",
                f"{len(values)} {each}{'s' * (len(values) != 1)}",
            )
        return list(zip(names, ranks, orders, strict=True))  # type: ignore[arg-type]

    def entries(self, widths: Sequence[int]) -> list[int]:
        """Entries of the vectors of projections of these widths. Raises ConfigError where groups do not divide them."""
        size = self.group_size
        assert isinstance(size, int), "the tuner puts a number in place of a head"
        for width in widths:
            expect(
                width % size == 0,
                "group_size",
                f"a divisor of {width}, the width of a target; leave that one out or take another size",
                size,
            )
        return [width // size for width in widths]

    @classmethod
    def variant(cls, number: int, num_layers: int | None = None, **options: Any) -> PedroConfig:
        """PEDRO-1 to PEDRO-7 of the paper's ablations; `options` override them, and 7 needs `num_layers`."""
        return cls(**{**variant_options(number, num_layers), **options})


def variant_options(number: int, num_layers: int | None = None) -> dict[str, Any]:
    """What the paper's variant changes: -1, -2 pooling; -3, -4 targets; -5, -6, -7 the activation."""
    if number == 7:
        expect(num_layers is not None, "num_layers", "the backbone's number of layers for PEDRO-7", None)
        assert num_layers is not None
        half = num_layers // 2
        return {"activation": ("relu",) * half + ("gelu",) * (num_layers - half)}
    changes: dict[int, dict[str, Any]] = {
        1: {"pool": "mean"},
        2: {"pool": "max"},
        3: {"targets": TARGETS, "r": 8},
        4: {"targets": ("q", "v"), "r": 24},
        5: {"activation": "relu"},
        6: {"activation": "gelu"},
    }
    expect(number in changes, "variant", "a number from 1 to 7", number)
    return changes[number]


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, (list, tuple)) else value


def _has_pairs(orders: object) -> bool:
    return isinstance(orders, tuple) and all(isinstance(pair, tuple) for pair in orders)


def _is_pair(orders: object) -> bool:
    return (
        isinstance(orders, tuple)
        and len(orders) == 2
        and all(map(is_count, orders))
        and 1 <= orders[0] <= 12
        and 0 <= orders[1] <= 12
    )
