"""Runners of a split model: each rank has one; the first rank's makes the others repeat its calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.engine.tensor_parallel.messages import CALL, MADE, KeptRows, Parts
from pedro.engine.tensor_parallel.shards import Shard, cut_adapter
from pedro.errors import BackboneError, PedroError
from pedro.methods.servable import read_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.adapter_kinds import Adapter
    from pedro.engine.kv_blocks import KVBlocks
    from pedro.engine.kv_budget import KVBudget
    from pedro.engine.model_executor import Logits
    from pedro.engine.modulation import PreemptedState, SlotRows
    from pedro.engine.sampler import Logprob
    from pedro.engine.tensor_parallel.collectives import Group
    from pedro.engine.tensor_parallel.peers import Peers
    from pedro.methods.architectures import Architecture

T = TypeVar("T")


def read_part(
    directory: Path, architecture: Architecture, backbone_digest: str, device: torch.device, shard: Shard
) -> Adapter:
    """A rank's part of the adapter in `directory`, which is checked as usual. `architecture` is the whole model's."""
    return cut_adapter(read_adapter(directory, architecture, backbone_digest, device), shard)


class ShardRunner(Runner):
    """A rank's part of the model, run through PyTorch's modules: the native kernel and captured graphs do not support
    ranks."""

    def __init__(
        self,
        model: PreTrainedModel,
        group: Group,
        slots: int,
        length: int,
        *,
        kernel: str = "auto",
        weights: str = "float32",
        **options: Any,
    ) -> None:
        for what, asked, fits in (("kernel", kernel, ("auto", "torch")), ("weights", weights, ("float32",))):
            if asked not in fits:
                raise BackboneError(
                    f"engine.{what}: {asked} is for the native kernel, which runs on one rank; use {what}: {fits[0]} "
                    "or tensor_parallel_size: 1"
                )
        self._ranks = group
        super().__init__(model, slots, length, kernel="torch", capture=False, **options)
        group.sum_outputs(self.architecture)  # after the modulation hooks, which act on each rank's part

    def _allowed_blocks(self, budget: KVBudget) -> int:
        """The same on all ranks: as many as fit on the one with the least memory. On a CPU they share it."""
        if self.device.type == "cpu":
            budget = replace(budget, sharers=budget.sharers * self._ranks.shard.size)
        own = torch.tensor([[float(super()._allowed_blocks(budget))]], device=self.device)
        return int(self._ranks.gather(own).min())


class LeadingRunner(ShardRunner):
    """The first rank's runner. An error in any rank's call ends the engine, since the ranks are no longer in sync."""

    def __init__(
        self,
        model: PreTrainedModel,
        group: Group,
        peers: Peers,
        whole: Architecture,
        slots: int,
        length: int,
        **options: Any,
    ) -> None:
        self._peers, self._group, self._whole = peers, group, whole
        self._parts = Parts()
        peers.on_lost = group.abort
        self._told(MADE, slots, length, **options)
        try:
            super().__init__(model, group, slots, length, **options)
        except PedroError:
            raise
        except Exception as error:
            raise peers.failed_here(error) from error
        peers.made()

    @property
    def lost(self) -> PedroError | None:
        """Why the engine cannot continue."""
        return self._peers.lost

    def on_lost(self, call: Callable[[], None]) -> None:
        """Call `call` once the engine cannot continue, from any thread."""

        def lost() -> None:
            self._group.abort()
            call()

        self._peers.on_lost = lost

    def read_adapter(self, directory: Path, backbone_digest: str) -> Adapter:
        """This rank's part of the adapter; waits until every rank has its own."""
        number, adapter = self._parts.reserve(), None

        def own() -> Adapter:
            nonlocal adapter
            adapter = read_part(directory, self._whole, backbone_digest, self.device, self._group.shard)
            self._parts.name(adapter, number)
            return adapter

        try:
            return self._peers.read(number, str(directory), own)
        finally:
            if adapter is None:
                self._parts.let_go(number)

    def begin(self, rows: list[PrefillRow]) -> None:
        self._led("begin", super().begin, rows)

    def advance(self, until: int | None = None) -> None:
        self._led("advance", super().advance, until)

    def end(self) -> tuple[Logits, list[list[Logprob | None] | None]]:
        return self._led("end", super().end)

    def abandon(self) -> None:
        if self.lost is None:  # else nothing will be read any more
            self._led("abandon", super().abandon)

    def decode(self, rows: list[DecodeRow]) -> Logits:
        return self._led("decode", super().decode, rows)

    def copy(self, source: int, targets: list[int], length: int, places: Sequence[int] = ()) -> None:
        self._led("copy", super().copy, source, targets, length, places)

    def reorder(self, pairs: list[tuple[int, int]], start: int, stop: int) -> None:
        self._led("reorder", super().reorder, pairs, start, stop)

    def wipe(self, slot: int, length: int | None = None, start: int = 0) -> None:
        self._led("wipe", super().wipe, slot, length, start)

    def release(self, slot: int) -> None:
        if self.lost is None:
            self._led("release", super().release, slot)

    def save_state(self, slot: int) -> PreemptedState:
        number = self._parts.reserve()
        self._told("keep_rows", slot, number)
        state = super().save_state(slot)
        rows = KeptRows(state.rows)
        self._parts.name(rows, number)
        return replace(state, rows=rows)

    def slot_rows(self, slot: int) -> SlotRows:
        return self.save_state(slot).rows

    def make_blocks(self, count: int) -> KVBlocks:
        self._led("make_blocks", super().make_blocks, count)
        return cast("KVBlocks", _LedBlocks(self))

    def save_blocks(self, slot: int, first: int, places: Sequence[int]) -> None:
        self._led("save_blocks", super().save_blocks, slot, first, places)

    def close(self) -> None:
        super().close()
        self._peers.close()

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), "tensor_parallel_size": self._group.shard.size}

    def _led(self, name: str, call: Callable[..., T], *arguments: Any) -> T:
        """Make a call on all ranks."""
        self._told(name, *arguments)
        try:
            return call(*arguments)
        except Exception as error:
            raise self._peers.failed_here(error) from error

    def _told(self, name: str, *arguments: Any, **options: Any) -> None:
        """Send to the other ranks. Raises the reason if one of them is lost."""
        self._peers.tell(CALL + self._parts.dump((name, arguments, options, self._parts.take_gone())))


class _LedBlocks:
    """The first rank's `KVBlocks`, for the prefix cache."""

    in_place = False

    def __init__(self, runner: LeadingRunner) -> None:
        self._runner = runner

    def save(self, slot: int, first: int, places: Sequence[int]) -> None:
        """As `KVBlocks.save`, on all ranks."""
        self._runner.save_blocks(slot, first, places)
