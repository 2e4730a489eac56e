"""What one job of a group trains with: an engine whose passes the table makes, and a context over the shared backbone.

torch only, but for what builds a context. The steps are `TorchEngine`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pedro.errors import ConfigError
from pedro.methods.registry import get_method
from pedro.training.context import DTYPES, MakeEngine, TrainingContext, build_context, device_of
from pedro.training.engines import TorchEngine
from pedro.training.shared.carrier import Carrier, check_repeatable, twin
from pedro.training.shared.table import Learning, Reading, Seat
from pedro.training.sharing import why_alone

if TYPE_CHECKING:
    from torch import nn

    from pedro.training.spec import FineTuneSpec


class SeatEngine(TorchEngine):
    """One job's engine; `seat` is where it waits for the others."""

    def __init__(self, *arguments: Any, seat: Seat, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seat = seat

    def clock(self) -> float:
        return self.seat.seconds

    def forward(self, positions: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.seat.ask(Reading(positions, batch, torch.is_grad_enabled()))
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        self.seat.ask(Learning(loss))


class SharedBackbone:
    """A backbone that is loaded once, and the passes over it; every job of the group has adapter modules of its own."""

    def __init__(self, spec: FineTuneSpec) -> None:
        """`spec` is of any job of the group. Raises ConfigError where its backbone or method cannot be shared."""
        from pedro.backbone import load_model, load_tokenizer, resolve_backbone

        if why := why_alone(spec):
            raise ConfigError(f"resources.share: {why}", param="resources.share")
        backbone = resolve_backbone(spec.backbone)
        self._bare: nn.Module = load_model(backbone, DTYPES[spec.training.precision], device_of(spec))
        check_repeatable(self._bare)
        adapted = get_method(spec.method.name).apply(twin(self._bare), spec.method.options)
        self.carrier = Carrier(adapted, load_tokenizer(backbone).pad_token_id)

    def context(self, spec: FineTuneSpec, cache: Path, seat: Seat, parent: Path | None = None) -> TrainingContext:
        """What the job at `seat` trains."""
        return build_context(spec, cache, self._engine(spec, seat), parent=parent, bare=twin(self._bare))

    def _engine(self, spec: FineTuneSpec, seat: Seat) -> MakeEngine:
        def make(model: nn.Module, optimizer: Any, parameters: Any) -> SeatEngine:
            self.carrier.join(seat.number, model)
            training = spec.training
            return SeatEngine(
                model,
                optimizer,
                parameters,
                seat=seat,
                accumulation=training.gradient_accumulation,
                clip=training.clip,
            )

        return make
