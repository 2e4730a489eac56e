"""One job's engine in a group, whose passes the coordinator runs, and its context over the shared backbone.

torch only, except for building a context. The steps are `TorchEngine`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pedro.errors import ConfigError
from pedro.methods.registry import get_method
from pedro.training.context import MakeEngine, TrainingContext, build_context, device_of, load_frozen
from pedro.training.cotraining.coordinator import Learning, Participant, Reading
from pedro.training.cotraining.stacked_model import StackedModel, check_repeatable, tied_copy
from pedro.training.engines import TorchEngine
from pedro.training.sharing import why_alone

if TYPE_CHECKING:
    from torch import nn

    from pedro.training.prepare import Tell
    from pedro.training.spec import FineTuneSpec


class CotrainingEngine(TorchEngine):
    """One job's engine; it waits for the others in `participant`."""

    def __init__(self, *arguments: Any, participant: Participant, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.participant = participant

    def clock(self) -> float:
        return self.participant.seconds

    def forward(self, positions: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.participant.ask(Reading(positions, batch, torch.is_grad_enabled()))
        return logits

    def backward(self, loss: torch.Tensor) -> None:
        self.participant.ask(Learning(loss))


class SharedBackbone:
    """A backbone that is loaded once, and the passes over it; every job of the group has its own adapter modules."""

    def __init__(self, spec: FineTuneSpec) -> None:
        """`spec` is any job's of the group. Raises ConfigError if its backbone or method cannot be shared."""
        from pedro.backbone import load_tokenizer, resolve_backbone

        if why := why_alone(spec):
            raise ConfigError(f"resources.share: {why}", param="resources.share")
        backbone = resolve_backbone(spec.backbone)
        self._bare: nn.Module = load_frozen(backbone, spec.training, device_of(spec))
        check_repeatable(self._bare)
        adapted = get_method(spec.method.name).apply(tied_copy(self._bare), spec.method.options)
        self.stacked_model = StackedModel(adapted, load_tokenizer(backbone).pad_token_id, spec.training.packing)

    def context(
        self,
        spec: FineTuneSpec,
        cache: Path,
        participant: Participant,
        parent: Path | None = None,
        tell: Tell = lambda _text: None,
    ) -> TrainingContext:
        """What the job at `participant` trains."""
        engine, bare = self._engine(spec, participant), tied_copy(self._bare)
        return build_context(spec, cache, engine, parent=parent, bare=bare, tell=tell)

    def _engine(self, spec: FineTuneSpec, participant: Participant) -> MakeEngine:
        def make(model: nn.Module, optimizer: Any, parameters: Any) -> CotrainingEngine:
            self.stacked_model.join(participant.number, model)
            training = spec.training
            return CotrainingEngine(
                model,
                optimizer,
                parameters,
                participant=participant,
                accumulation=training.gradient_accumulation,
                clip=training.clip,
                packing=False,  # the stacked model packs the rows of all jobs
            )

        return make
