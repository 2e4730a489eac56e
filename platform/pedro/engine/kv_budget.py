"""How many blocks of keys and values an engine may have: what was asked for, or a share of the memory that is free."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError
from pedro.process import available_memory

if TYPE_CHECKING:
    import torch

    from pedro.engine.kv_cache import SlotCache

log = logging.getLogger(__name__)
KVMemory = int | float | None  # bytes; a share, up to 1.0, of what is free beside the weights; None: the usual share
SHARES = {"cuda": 0.8}  # of a device that is the engine's own; prefills and captured steps take memory, too
SHARE = 0.5  # of a machine that others use
MOST = 0.9  # of what is free, for one whole context where the usual share has no room for it


@dataclass(frozen=True)
class KVBudget:
    """What was asked for, and how much of the free memory is others'.

    `reserved`: bytes that this process may take for other things. `sharers`: how many processes like it have the free
    memory between them. `whole`: somebody asked for this length, so that less than one whole context is an error.
    """

    memory: KVMemory = None
    reserved: int = 0
    sharers: int = 1
    whole: bool = False


def allowed_blocks(cache: SlotCache, budget: KVBudget) -> int:
    """Blocks of the cache within the budget. Raises ConfigError where a number of bytes is less than one block.

    The usual share is never less than one whole context, as far as all free memory goes.
    """
    memory = budget.memory
    if isinstance(memory, int):
        if memory < cache.block_bytes:
            raise ConfigError(
                f"kv_memory: one block of {cache.block} tokens takes {size(cache.block_bytes)}, got {size(memory)}",
                param="kv_memory",
            )
        return memory // cache.block_bytes
    free = _free_memory(cache.device)
    if free is None:
        return cache.blocks
    share = memory or SHARES.get(cache.device.type, SHARE)
    blocks = int(share * (free / budget.sharers - budget.reserved)) // cache.block_bytes
    context = cache.blocks_per_slot
    if memory is None and blocks < context:
        log.warning(
            "memory is short: of %s free, a replica's share for keys and values has no room for one context of %d "
            "tokens (%s); it takes that much all the same. Lower --max-length, --adapter-budget-mb or "
            "--prefix-cache-mb, or give a size with --kv-memory",
            size(free), cache.length, size(context * cache.block_bytes),
        )  # fmt: skip
        lazy = cache.device.type == "cpu"  # what is reserved is taken as it fills, if ever
        blocks = min(context, int(MOST * (free if lazy else free - budget.reserved)) // cache.block_bytes)
    return max(1, blocks)


def check_whole(cache: SlotCache, blocks: int, budget: KVBudget) -> None:
    """Raise ConfigError where somebody asked for a length that `blocks` have no room for."""
    if budget.whole and blocks < cache.blocks_per_slot:
        has, wants = blocks * cache.block_bytes, cache.blocks_per_slot * cache.block_bytes
        param = "max_length" if budget.memory is None else "kv_memory"
        raise ConfigError(
            f"{param}: one context of {cache.length:,} tokens takes {size(wants)} for keys and values, and there is "
            f"room for {size(has)} ({blocks * cache.block:,} tokens); lower --max-length or give more (--kv-memory)",
            param=param,
        )


def fits(stats: dict[str, Any]) -> str:
    """One line: what the keys and values of an engine with these `Engine.stats()` have room for."""
    block, blocks, slots = stats["kv_block_tokens"], stats["kv_blocks"], stats["slots"]
    longest, context = stats["max_length"], stats["context"]
    each, full = blocks // slots * block, blocks // -(-longest // block)
    many = f"{slots} sequences of " + (f"the full {longest:,}" if each >= longest else f"{each:,} tokens")
    if not each:
        many = f"{blocks} sequences of {block:,} tokens"
    rest = "" if each >= longest else f", or {full} of the full {longest:,}"
    cut = "" if longest == context else f"; the context of {context:,} is cut to that: --kv-memory gives more"
    return f"KV cache: {size(stats['kv_cache_bytes'])} at most, {blocks * block:,} tokens: {many}{rest}{cut}"


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a whole digit: `6.0 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
