"""The loop's engines: one model, one GroupedAdamW, gradients summed over all workers. torch only.

`StepEngine` is the interface. `TorchEngine` is a single process without DeepSpeed: the reference for the others, and
sufficient on a machine with nothing but torch. The other one is in `ds_engine.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from pedro.methods.output_head import logits_at
from pedro.methods.packing import Packing, attending_in_rows, packer_of

if TYPE_CHECKING:
    from pedro.methods.training_hook import TrainingHook
    from pedro.training.bilevel import GroupedAdamW, Named


class StepEngine(Protocol):
    """One optimizer step is `backward(forward(...))` and `step()` for every slice; the last `step` updates
    parameters."""

    rank: int
    world: int
    device: torch.device
    optimizer: GroupedAdamW
    parameters: Named
    """The trainable parameters by name; under ZeRO-3 their data are only available inside `gathered()`."""
    hook: TrainingHook | None
    """The method's hook between steps, for methods whose shape changes during training."""

    def clock(self) -> float:
        """Worker seconds used by the run, from an arbitrary start."""

    def forward(self, positions: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] at the N marked `positions` ([B, T], bool) of the batch, row by row."""

    def bare(self) -> AbstractContextManager[None]:
        """Within this context, `forward` is that of the backbone without its adapter, in evaluation mode."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`; they are summed over all workers and slices, not averaged."""

    def step(self) -> None:
        """Call after each `backward`; after the last slice of a batch it clips, updates and clears the gradients."""

    def mode(self, training: bool) -> None:
        """Switch between training and evaluation."""

    def gathered(self) -> AbstractContextManager[None]:
        """Within this context, every worker can read, and identically write, the whole data of `parameters`."""

    def masters(self) -> Sequence[torch.Tensor]:
        """The tensors updated by this worker's optimizer: parameters, or its partition of them."""

    def replicated(self) -> bool:
        """Whether every worker's `masters` are the same."""


class TorchEngine:
    """One process, plain torch."""

    rank, world = 0, 1

    def __init__(
        self,
        model: nn.Module,
        optimizer: GroupedAdamW,
        parameters: Named,
        *,
        accumulation: int,
        clip: float,
        packing: bool = True,
    ) -> None:
        self.model, self.optimizer, self.parameters = model, optimizer, parameters
        self.hook: TrainingHook | None = None
        self.device = parameters[0][1].device
        self._accumulation, self._clip, self._slices = accumulation, clip, 0
        self._pack = packer_of(model) if packing else None
        optimizer.materialise(self.masters())

    def clock(self) -> float:
        return time.monotonic()

    def forward(self, positions: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        if self._pack is not None and (packing := self._pack(batch)) is not None:
            return packed_logits(self.model, packing, positions, batch)
        with logits_at(self.model, positions):
            logits: torch.Tensor = self.model(**batch, use_cache=False).logits[0]
            return logits

    def bare(self) -> AbstractContextManager[None]:
        return adapter_off(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self._slices += 1
        if self._slices % self._accumulation:
            return
        if self._clip:
            nn.utils.clip_grad_norm_([p for _, p in self.parameters if p.grad is not None], self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def mode(self, training: bool) -> None:
        self.model.train(training)

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def masters(self) -> Sequence[torch.Tensor]:
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def replicated(self) -> bool:
        return True


def packed_logits(
    model: nn.Module,
    packing: Packing,
    positions: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    wrapper: nn.Module | None = None,
) -> torch.Tensor:
    """What `StepEngine.forward` gives, of a pass without padding. `wrapper` is called in the model's place."""
    called = model if wrapper is None else wrapper
    with logits_at(model, packing.pack(positions)), attending_in_rows(model):
        logits: torch.Tensor = called(**packing.packed(batch), use_cache=False).logits[0]
        return logits


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Within this context, `model` acts as its backbone, in evaluation mode. Afterwards `requires_grad` is restored:

    PEFT makes all parameters of an adapter trainable when it is enabled again, including those frozen in this step.
    """
    training, wanted = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)
        for parameter, trains in wanted:
            parameter.requires_grad_(trains)


def optimizer_tensors(engine: StepEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """The state of a worker's optimizer by position: masters, moments and step counts."""
    for index, master in enumerate(engine.masters()):
        yield f"{index}.master", master
        for name, tensor in sorted(engine.optimizer.state[master].items()):
            yield f"{index}.{name}", tensor
