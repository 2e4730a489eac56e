"""The loop's engine on DeepSpeed: ZeRO 0 to 3 over any number of workers. The only file that imports DeepSpeed.

The process group must exist (Ray Train creates it, tests do so by hand). DeepSpeed averages gradients over workers; the
loss passed in is already divided by the tokens of all workers, so it is multiplied by the number of workers first. The
result does not depend on the stage or the number of workers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pedro.methods.output_head import logits_at
from pedro.methods.packing import packer_of
from pedro.training.backbone_pieces import Piece
from pedro.training.engines import adapter_off, packed_logits
from pedro.training.frozen_linear import use_frozen_linear

if TYPE_CHECKING:
    from pedro.methods.training_hook import TrainingHook
    from pedro.training.bilevel import GroupedAdamW, Named


class DeepSpeedEngine:
    """A `StepEngine` around `deepspeed.initialize`; `optimizer`, `parameters` and `packing` as in TorchEngine.

    Each worker packs its own rows, or pads them, as it saves: modules, and so all that workers gather and reduce
    together, come in the same order either way.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: GroupedAdamW,
        parameters: Named,
        config: dict[str, Any],
        *,
        packing: bool = True,
    ) -> None:
        deepspeed = import_deepspeed()
        self._stage = config.get("zero_optimization", {}).get("stage", 0)
        self._sharded = bool(self._stage) or "bf16" in config
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints memory statistics
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        if self._stage == 3:
            use_frozen_linear()
        self._deepspeed = deepspeed
        self.model, self.optimizer, self.parameters = model, optimizer, parameters
        self.hook: TrainingHook | None = None
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = torch.device(self._engine.device)
        self._pack = packer_of(model) if packing else None
        optimizer.materialise(self.masters())

    def clock(self) -> float:
        return time.monotonic()

    def forward(self, positions: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        if self._pack is not None and (packing := self._pack(batch)) is not None:
            return packed_logits(self.model, packing, positions, batch, self._engine)
        with logits_at(self.model, positions):
            logits: torch.Tensor = self._engine(**batch, use_cache=False).logits[0]
            return logits

    def bare(self) -> AbstractContextManager[None]:
        return adapter_off(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self.world, scale_wrt_gas=False)

    def step(self) -> None:
        self._engine.step()

    def mode(self, training: bool) -> None:
        self._engine.train(training)

    def gathered(self) -> AbstractContextManager[None]:
        if self._stage < 3:
            return nullcontext()
        # modifier_rank: every partition keeps what rank 0 wrote
        gathered: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters(
            [p for _, p in self.parameters], modifier_rank=0
        )
        return gathered

    def masters(self) -> Sequence[torch.Tensor]:
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]

    def replicated(self) -> bool:
        return not self._sharded


@contextmanager
def partitioning(config: dict[str, Any]) -> Iterator[None]:
    """Within this context, a module's parameters are sharded over the workers when it is created (ZeRO-3)."""
    deepspeed = import_deepspeed()
    with deepspeed.zero.Init(config_dict_or_path=deepcopy(config), tensor_overrides=()):  # keep the model's dtypes
        yield


def pieces(model: nn.Module) -> Iterator[Piece]:
    """This worker's piece of each parameter created within `partitioning`."""
    for name, parameter in model.named_parameters():
        shard: Any = parameter
        yield Piece(name, shard.ds_numel, shard.ds_zero_partition_rank * shard.ds_tensor.numel(), shard.ds_tensor)


def import_deepspeed() -> Any:
    """DeepSpeed without log output and compilation, with its process group around torch's.

    Its CPU communication kernel would be built with g++ on first use, which takes minutes or fails without a compiler.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
