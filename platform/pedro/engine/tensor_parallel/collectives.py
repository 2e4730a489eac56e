"""Communication between ranks while a model runs: all-reduce of partial results, all-gather of rows.

The process group is separate from torch.distributed's global one, which belongs to the application.
Legend: N tokens, D model width, V vocabulary, P rows of a rank's part of it.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from pedro.engine.tensor_parallel.shards import Shard
    from pedro.methods.architectures import Architecture

HERE = "127.0.0.1"  # all ranks are on one machine, unreachable from others


class Group:
    """The ranks of one engine. Every rank must make the same calls, and each waits `timeout_s` for the others."""

    def __init__(self, shard: Shard, device: torch.device, meeting: str, timeout_s: float) -> None:
        """`meeting`: a file that does not exist yet, the same for all ranks, used for their rendezvous."""
        self.shard = shard
        c10d: Any = dist
        store = c10d.FileStore(meeting, shard.size)
        store.set_timeout(timedelta(seconds=timeout_s))
        self._on_cpu = device.type == "cpu"
        make = c10d.ProcessGroupGloo if self._on_cpu else c10d.ProcessGroupNCCL
        options = make._Options() if self._on_cpu else make.Options()
        options._timeout = timedelta(seconds=timeout_s)
        if not self._on_cpu:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        if self._on_cpu:
            options._devices = [make.create_device(hostname=HERE)]
        self._backend: Any = make(store, shard.rank, shard.size, options)
        self.sum(torch.zeros(1, device=device))  # once all have joined, the file is no longer needed

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; 16-bit numbers on a CPU are summed in float32, which gloo always supports."""
        whole = part.float() if self._on_cpu else part
        whole = whole.contiguous()
        self._backend.allreduce([whole]).wait()
        return whole.to(part.dtype)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """[N, P] of each rank → [N, size · P]."""
        part = part.float().contiguous()
        parts = [torch.empty_like(part) for _ in range(self.shard.size)]
        self._backend.allgather([parts], [part]).wait()
        return torch.cat(parts, -1)

    def abort(self) -> None:
        """End a call that waits for a lost rank. gloo notices the loss by itself."""
        if not self._on_cpu:
            self._backend.abort()

    def sum_outputs(self, architecture: Architecture) -> None:
        """Sum the outputs of o and down over the ranks, after any hooks on these outputs."""

        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return self.sum(output)

        for layer in architecture.layers:
            layer.output.register_forward_hook(hook)
            layer.down.register_forward_hook(hook)


class SplitEmbedding(nn.Module):
    """A rank's part of the embedding: tokens of other ranks are zeros here; the results are summed."""

    group: Group

    def __init__(self, tokens: int, width: int, shard: Shard, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = tokens, width
        self.own = shard.of_vocabulary(tokens)
        part = -(-tokens // shard.size)  # the same on every rank: excess rows stay zero
        self.weight = nn.Parameter(torch.zeros(part, width, dtype=dtype), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids [1, N] → [1, N, D]."""
        own = (ids >= self.own.start) & (ids < self.own.stop)
        found = F.embedding((ids - self.own.start).where(own, 0), self.weight)
        return self.group.sum(found * own[..., None])


class SplitHead(nn.Module):
    """A rank's part of the output embedding; the logits are gathered on every rank, so that all run the same code."""

    group: Group

    def __init__(self, tokens: int, weight: nn.Parameter) -> None:
        super().__init__()
        self.out_features, self.in_features = tokens, weight.shape[1]
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden [n, D] → logits [n, V]."""
        return self.group.gather(F.linear(hidden, self.weight))[..., : self.out_features]
