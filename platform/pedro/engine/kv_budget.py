"""How many KV blocks an engine may use: the requested size, or a share of free memory."""

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
KVMemory = int | float | None  # bytes; a share, up to 1.0, of memory free after loading; None: the default share
SHARES = {"cuda": 0.8}  # of a dedicated device; prefills and captured steps take memory, too
SHARE = 0.5  # of a shared machine
MOST = 0.9  # of free memory, for one whole context if it exceeds the default share


@dataclass(frozen=True)
class KVBudget:
    """The requested size, and how the free memory is divided.

    `reserved`: bytes that this process may need for other things. `sharers`: how many such processes divide the free
    memory. `whole`: the length was set explicitly, so that room for less than one whole context is an error.
    """

    memory: KVMemory = None
    reserved: int = 0
    sharers: int = 1
    whole: bool = False


def allowed_blocks(cache: SlotCache, budget: KVBudget) -> int:
    """Blocks of the cache within the budget. Raises ConfigError if a size in bytes is less than one block.

    The default share is never less than one whole context, if free memory allows.
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
            "memory is short: with %s free, one context of %d tokens (%s) exceeds a replica's share for keys and "
            "values, but is reserved anyway. Lower --max-length, --adapter-budget-mb or --prefix-cache-mb, or set a "
            "size with --kv-memory",
            size(free), cache.length, size(context * cache.block_bytes),
        )  # fmt: skip
        lazy = cache.device.type == "cpu"  # reserved memory is only taken as it fills
        blocks = min(context, int(MOST * (free if lazy else free - budget.reserved)) // cache.block_bytes)
    return max(1, blocks)


def check_whole(cache: SlotCache, blocks: int, budget: KVBudget) -> None:
    """Raise ConfigError if an explicitly set length does not fit into `blocks`."""
    if budget.whole and blocks < cache.blocks_per_slot:
        has, wants = blocks * cache.block_bytes, cache.blocks_per_slot * cache.block_bytes
        param = "max_length" if budget.memory is None else "kv_memory"
        raise ConfigError(
            f"{param}: one context of {cache.length:,} tokens needs {size(wants)} for keys and values, but only "
            f"{size(has)} ({blocks * cache.block:,} tokens) fit; lower --max-length or raise --kv-memory",
            param=param,
        )


def fits(stats: dict[str, Any]) -> str:
    """One line that says how many sequences fit into the KV cache of an engine with these `Engine.stats()`."""
    block, blocks, slots = stats["kv_block_tokens"], stats["kv_blocks"], stats["slots"]
    longest, context = stats["max_length"], stats["context"]
    each, full = blocks // slots * block, blocks // -(-longest // block)
    many = f"{slots} sequences of " + (f"the full {longest:,}" if each >= longest else f"{each:,} tokens")
    if not each:
        many = f"{blocks} sequences of {block:,} tokens"
    rest = "" if each >= longest else f", or {full} of the full {longest:,}"
    cut = "" if longest == context else f"; the context of {context:,} is reduced to that: raise --kv-memory"
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
