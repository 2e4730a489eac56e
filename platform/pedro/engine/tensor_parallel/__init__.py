"""One backbone over several processes of this machine, each with a part of every layer and of every adapter.

The first rank schedules, samples and answers; the others repeat the calls of its runner (`runner`, `follower`). Partial
results are summed twice per layer (`collectives`). Adapters are split like the projections (`shards`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pedro.engine.tensor_parallel.collectives import Group
from pedro.engine.tensor_parallel.loading import join, load_shard, whole_architecture
from pedro.engine.tensor_parallel.messages import Orders
from pedro.engine.tensor_parallel.peers import Peers
from pedro.engine.tensor_parallel.runner import LeadingRunner
from pedro.engine.tensor_parallel.shards import Shard, check_split
from pedro.errors import ConfigError

if TYPE_CHECKING:
    from pedro.backbone import Backbone

TIMEOUT_S = 120.0  # for which a rank waits for others within a step; a dead rank is noticed at once

__all__ = ["TensorParallel", "check_devices", "check_split"]


class TensorParallel:
    """The ranks of one engine; this process is the first, and starts the others. Pass it to one `Engine`, together with
    `model`; the engine closes it.

    Raises BackboneError if the backbone cannot be split so, ConfigError if there are fewer GPUs than ranks.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: int,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int = 1,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        from pedro.backbone import check_dtype_and_device, load_config

        check_split(load_config(backbone), size, backbone.id)
        check_dtype_and_device(dtype, device)
        check_devices(device, size)
        devices = [device if device == "cpu" else f"{device}:{rank}" for rank in range(size)]
        shards = [Shard(rank, size) for rank in range(size)]
        self._peers = Peers(size - 1, timeout_s)
        try:
            with tempfile.TemporaryDirectory(prefix="pedro-ranks-") as folder:
                meeting = str(Path(folder) / "meeting")
                self._peers.start(
                    [
                        Orders(backbone, dtype, devices[shard.rank], shard, meeting, threads, timeout_s)
                        for shard in shards[1:]
                    ]
                )
                self.model = load_shard(backbone, dtype, devices[0], shards[0])
                self._whole = whole_architecture(backbone)
                self._peers.started()

                def meet() -> None:
                    self._group = Group(shards[0], torch.device(devices[0]), meeting, timeout_s)
                    join(self.model, self._group)

                self._peers.join(meet)
        except BaseException:
            self._peers.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids of the other ranks."""
        return self._peers.pids

    def make_runner(self, *arguments: Any, **options: Any) -> LeadingRunner:
        """The runner of `model`, with the arguments of `Runner`."""
        try:
            return LeadingRunner(self.model, self._group, self._peers, self._whole, *arguments, **options)
        except BaseException:
            self._peers.close()
            raise

    def close(self) -> None:
        """End the other ranks, if no engine does."""
        self._peers.close()


def check_devices(device: str, size: int) -> None:
    """Raise ConfigError if there are fewer devices than ranks."""
    if device == "cpu":
        return
    found = torch.cuda.device_count()
    if device != "cuda" or found < size:
        raise ConfigError(
            f"tensor_parallel_size: {size} ranks need a GPU each, and --device {device} has {found}; use --device cuda "
            "and as many ranks as there are GPUs",
            param="tensor_parallel_size",
        )
