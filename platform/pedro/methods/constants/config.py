"""What a constant-vector adapter is, and how its tensors become vectors.

A projection's output y becomes scale ⊙ y + shift, with vectors that are the same for every prompt:
- RED (arXiv 2402.15179, eq. 4): scale and shift of the feed-forward's output, `down`;
- BitFit (arXiv 2106.10199): shifts of all seven linears;
- both, and (IA)³ (arXiv 2205.05638), in the form of the PEDRO paper's baselines (arXiv 2409.17834, section 4.2): each
  vector is learned in r' dimensions (`code`) and a learned matrix (`up`) makes it as wide as the output.

Shapes: W_s and W_b widths of all targets of `scale` and `shift` together, r the bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from pedro.errors import ConfigError
from pedro.methods.architectures import LINEARS
from pedro.methods.blocks import TunerConfig
from pedro.methods.options import is_count


@dataclass
class ConstantConfig(TunerConfig):
    """Options of constant vectors; PEFT saves them in adapter_config.json. Raises ConfigError for an impossible one."""

    kind: ClassVar[str] = "CONSTANT"

    scale: tuple[str, ...] = field(
        default=(), metadata={"help": f"Projections whose outputs are scaled, of {', '.join(LINEARS)}."}
    )
    shift: tuple[str, ...] = field(
        default=(), metadata={"help": f"Projections whose outputs are shifted, of {', '.join(LINEARS)}."}
    )
    r: int | None = field(default=None, metadata={"help": "Learn each vector in r dimensions; None: as it is."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale, self.shift = tuple(self.scale), tuple(self.shift)
        for name, targets in (("scale", self.scale), ("shift", self.shift)):
            if not all(target in LINEARS and targets.count(target) == 1 for target in targets):
                raise ConfigError(f"{name}: expected distinct names of {', '.join(LINEARS)}, got {targets}", param=name)
        if not self.scale and not self.shift:
            raise ConfigError("scale: expected at least one target of scale or shift, got none", param="scale")
        if self.r is not None and (not is_count(self.r) or self.r <= 0):
            raise ConfigError(f"r: expected a whole number > 0 or null, got {self.r!r}", param="r")

    def shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """A layer's tensors by name; `widths` are its projections' output widths."""
        shapes: dict[str, tuple[int, ...]] = {}
        for kind, targets in (("scale", self.scale), ("shift", self.shift)):
            total = sum(widths[target] for target in targets)
            if targets and self.r is None:
                shapes[f"constant_{kind}"] = (total,)
            elif targets:
                shapes[f"constant_{kind}_code"] = (len(targets), self.r or 0)
                shapes[f"constant_{kind}_up"] = (self.r or 0, total)
        return shapes


Vectors = dict[str, torch.Tensor]  # target -> [width]


def constant_vectors(
    config: ConstantConfig, widths: Mapping[str, int], tensors: Mapping[str, torch.Tensor]
) -> tuple[Vectors, Vectors]:
    """One layer's (scales, shifts), float32, from its tensors as `config.shapes` names them."""
    made: list[Vectors] = []
    for kind, targets in (("scale", config.scale), ("shift", config.shift)):
        vectors: Vectors = {}
        if targets:
            sizes = [widths[target] for target in targets]
            if config.r is None:
                parts = list(tensors[f"constant_{kind}"].float().split(sizes))
            else:
                code, up = tensors[f"constant_{kind}_code"].float(), tensors[f"constant_{kind}_up"].float()
                start = 1.0 if kind == "scale" else 0.0
                parts = [start + c @ u for c, u in zip(code, up.split(sizes, dim=1), strict=True)]
            vectors = dict(zip(targets, parts, strict=True))
        made.append(vectors)
    return made[0], made[1]
