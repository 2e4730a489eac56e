"""Keys and values of prompts that were read, in blocks, for prompts that begin alike. Used on the step thread.

Blocks form a tree. The key of a block is its parent's number and its own tokens, so that equal keys mean equal prompts
up to there: tokens are compared, never only their hash. Above the first block stands the owner: whose prompt it was,
with which salt and adapter; what one owner left is never found by another.
Legend: L layers, K key-value heads, d head width.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    import torch

    from pedro.adapter_kinds import Adapter
    from pedro.engine.kv_cache import KVCache
    from pedro.engine.sequence import Sequence
    from pedro.engine.steps import NewToken

BLOCK = 16  # tokens of a block
OVERHEAD = 2048  # bytes that a block takes beside its tensor: its tokens and its entry


@dataclass(frozen=True, eq=False)
class PrefixBlock:
    """Keys and values of `BLOCK` tokens, [L, 2, K, BLOCK, d]."""

    number: int
    kv: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + OVERHEAD


class PrefixCache:
    """The blocks used last, within `budget_bytes`; 0 keeps none."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._blocks: OrderedDict[tuple[Hashable, tuple[int, ...]], PrefixBlock] = OrderedDict()  # used last at the end
        self._numbers = itertools.count()
        self._used_bytes = 0
        self._counts = dict.fromkeys(("hits", "saved_tokens", "evictions"), 0)

    def look_up(self, sequence: Sequence, adapter: Adapter | None) -> None:
        """Before the sequence starts: what its prefill need not read. What was preempted is read whole again, as is a
        prompt whose log-probabilities, or mean, are asked for: they need the state of every token."""
        whole = sequence.params.prompt_logprobs is not None or sequence.params.pooling == "mean"
        anew = sequence.resumes or whole
        owner = None if anew else self._owner(sequence, adapter)
        sequence.prefix = () if owner is None else self.find(owner, sequence.request.prompt_ids)

    def prefilled(self, made: list[NewToken], adapter: Adapter | None, cache: KVCache) -> None:
        """The answers to one request got their first tokens: count what was saved, keep the prompt."""
        leader = made[0][0]
        cached = BLOCK * len(leader.prefix)
        self._counts["hits"] += cached > 0
        self._counts["saved_tokens"] += cached
        owner = None if leader.resumes else self._owner(leader, adapter)
        if owner is not None and all(token_id >= 0 for _, token_id, _ in made):  # else keys may not be finite
            self.keep(owner, leader.request.prompt_ids, cache, leader.slot)
        for sequence, *_ in made:
            sequence.cached_tokens = sequence.cached_tokens if leader.resumes else cached
            sequence.prefix = ()

    def find(self, owner: Hashable, token_ids: list[int]) -> tuple[PrefixBlock, ...]:
        """The blocks that hold the beginning of the prompt. At least its last token is left to be read."""
        found: list[PrefixBlock] = []
        keys: list[tuple[Hashable, tuple[int, ...]]] = []
        parent: Hashable = owner
        for tokens in _blocks(token_ids[:-1]):
            block = self._blocks.get((parent, tokens))
            if block is None:
                break
            keys.append((parent, tokens))
            found.append(block)
            parent = block.number
        self._touch(keys)
        return tuple(found)

    def keep(self, owner: Hashable, token_ids: list[int], cache: KVCache, slot: int) -> None:
        """Copy the prompt's whole blocks from the slot that holds it, those that are not here yet."""
        parent: Hashable = owner
        keys: list[tuple[Hashable, tuple[int, ...]]] = []
        nbytes = 0
        for at, tokens in enumerate(_blocks(token_ids)):
            key = (parent, tokens)
            block = self._blocks.get(key)
            if block is None:
                block = PrefixBlock(next(self._numbers), cache.cut(slot, at * BLOCK, (at + 1) * BLOCK))
                if nbytes + block.nbytes > self.budget_bytes:
                    break
                self._blocks[key] = block
                self._used_bytes += block.nbytes
            nbytes += block.nbytes
            keys.append(key)
            parent = block.number
        self._touch(keys)
        while self._used_bytes > self.budget_bytes:
            _, gone = self._blocks.popitem(last=False)
            self._used_bytes -= gone.nbytes
            self._counts["evictions"] += 1

    def stats(self) -> dict[str, int]:
        """Prompts that found a beginning, the tokens this saved, evictions; blocks and bytes now."""
        return {
            **self._counts,
            "blocks": len(self._blocks),
            "used_bytes": self._used_bytes,
            "budget_bytes": self.budget_bytes,
        }

    def _owner(self, sequence: Sequence, adapter: Adapter | None) -> Hashable | None:
        """Who may use what was read of this prompt; None for nobody: the adapter's vectors come from all of it."""
        request = sequence.request
        nobody = adapter is not None and adapter.generator is not None
        return None if nobody else (request.tenant, request.cache_salt, request.adapter)

    def _touch(self, keys: list[tuple[Hashable, tuple[int, ...]]]) -> None:
        """Count a prompt's blocks as used now, its first as the last: without its parent a block is not found."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)


def _blocks(token_ids: list[int]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
        yield tuple(token_ids[start : start + BLOCK])
