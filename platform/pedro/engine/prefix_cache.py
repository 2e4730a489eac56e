"""Cached keys and values, in blocks, for prompts that begin alike. Used on the step thread.

`reuse_of` decides who may reuse them. Keys and values depend on the tokens up to their own, on the adapter that acted
on these and, if it generates vectors from the prompt, on everything that the vectors were generated from. Anything else
that influences how a token is processed, such as a position determined by later tokens, belongs in the key. The key
also contains the tenant: by default nothing passes from one tenant to another, not even through response times.

Blocks form a tree. The key of a block is its parent's number and its own tokens, so that equal keys mean equal prompts
up to there: numbers are never reused, and the tokens themselves are compared, not only their hash. The parent of a
first block is a `PrefixKey`, which says who may reuse it. Vectors that an adapter generated from a prompt are cached
under it, too.

A block that a sequence is about to begin with is referenced, and never evicted. Where blocks are read in place
(`KVBlocks`), it stays so until the sequence leaves its slot; what is forgotten meanwhile is found by nobody, and its
memory given back then.
"""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pedro.engine.kv_blocks import BLOCK, block_bytes

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter
    from pedro.engine.modulation import SlotRows
    from pedro.engine.runner import Runner
    from pedro.engine.sequence import Request, Sequence
    from pedro.engine.steps import NewToken

OVERHEAD = 2048  # bytes per block beside its keys and values: its tokens and its entry
TOKEN_BYTES = array("i").itemsize
ANY_TENANT = None


class PrefixKey(NamedTuple):
    """What two prompts must have in common besides their leading tokens. Compared as a whole."""

    tenant: str | None  # None: any tenant
    salt: str
    adapter: str | None  # a version with its digest; None: the bare backbone
    epoch: int  # of the cache: blocks of earlier epochs are never found
    conditioning: bytes  # the tokens that vectors depend on; empty if they do not depend on the prompt


class Reuse(NamedTuple):
    """A prompt's key, and how many tokens of prompt and answer it is valid for and worth caching (None: all)."""

    key: PrefixKey
    until: int | None = None


def reuse_of(request: Request, adapter: Adapter | None, epoch: int = 0, share_bare: bool = False) -> Reuse:
    """Who may share the request's prefix, in this epoch of the cache.

    `share_bare`: the operator lets tenants share tokens on which no adapter acted; a request with a salt still shares
    only within its tenant.
    """
    named, conditioning, until = request.adapter, b"", None
    if adapter is not None:
        length = request.conditioning_length or len(request.prompt_ids)
        start = adapter.start_in(request.prompt_ids, length)
        read = adapter.conditioned_by(request.prompt_ids[:length])
        if start is None:
            named = None
        elif start:  # earlier tokens see the bare backbone; tokens that condition vectors must be read
            pooled = len(request.prompt_ids) if adapter.generator is None else adapter.generator.first_pooled(read)
            named, until = None, min(start, pooled)
        elif adapter.reads_prompt:
            conditioning = token_bytes(request.prompt_ids[:read])
            whole = request.conditioning_length is None and (
                adapter.generator is None or adapter.generator.head is None
            )
            until = read if whole else None  # no other prompt can begin with its answer
    tenant = ANY_TENANT if share_bare and named is None and not request.cache_salt else request.tenant
    return Reuse(PrefixKey(tenant, request.cache_salt, named, epoch, conditioning), until)


EntryKey = tuple[PrefixKey | int, bytes]  # of a first block, or of a child; vectors have no tokens


@dataclass(eq=False)
class PrefixEntry:
    """A block, with its number and its place in `KVBlocks`, or the vectors of a prompt."""

    adapter: str | None
    nbytes: int
    number: int = -1
    place: int = -1
    rows: SlotRows | None = None
    refcount: int = 0
    gone: bool = False  # nobody finds it any more


@dataclass(frozen=True)
class Prefix:
    """The cached beginning of a prompt: its blocks, and the vectors if they depend on the prompt."""

    blocks: tuple[PrefixEntry, ...]
    rows: SlotRows | None = None

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(block.place for block in self.blocks)

    @property
    def num_tokens(self) -> int:
        return BLOCK * len(self.blocks)


NOTHING = Prefix(())


@dataclass(frozen=True)
class _Unkept:
    """What a slot holds until the next step and is to be kept, but for what it borrows."""

    reuse: Reuse
    token_ids: list[int]
    slot: int
    borrowed: tuple[PrefixEntry, ...] = ()


class PrefixCache:
    """An LRU cache of `budget_bytes`; if these are less than one block, nothing is cached."""

    def __init__(self, runner: Runner, budget_bytes: int, share_bare: bool = False) -> None:
        self.budget_bytes = budget_bytes
        self._block_bytes = block_bytes(runner.cache) + OVERHEAD
        self._rows_of, self._share_bare = runner.slot_rows, share_bare
        count = budget_bytes // self._block_bytes
        self._blocks = runner.make_blocks(count) if count else None
        self._free = list(range(count))  # a heap, so that neighbours can be copied together
        self._entries: OrderedDict[EntryKey, PrefixEntry] = OrderedDict()  # most recently used at the end
        self._numbers = itertools.count()
        self._unkept: list[_Unkept] = []
        self._epoch, self._kept_epoch = 0, 0
        self._used_bytes = 0
        self._bytes_of: Counter[str | None] = Counter()
        self._counts = dict.fromkeys(("queried_tokens", "hits", "saved_tokens", "evictions"), 0)

    def look_up(self, sequence: Sequence, adapter: Adapter | None) -> None:
        """Before the sequence starts: what its prefill need not read, held until `begun` or `release`. A prompt whose
        log-probabilities, or mean, are asked for is read whole: they need the state of every token."""
        self.release(sequence)
        sequence.num_cached = 0
        if self._blocks is None:
            return
        if sequence.reuse is None:
            sequence.reuse = reuse_of(sequence.request, adapter, self._epoch, self._share_bare)
        whole = sequence.params.prompt_logprobs is not None or sequence.params.pooling == "mean"
        if whole and not sequence.resumes:
            return
        found = self._find(sequence.reuse, sequence.prefill_ids)
        if found.blocks:
            self._hold(sequence, found)
            sequence.num_cached = found.num_tokens

    def begun(self, sequences: Iterable[Sequence]) -> None:
        """The prefill of these began: where blocks are not read in place, their slots hold what was found."""
        if self._blocks is not None and not self._blocks.in_place:
            for sequence in sequences:
                self.release(sequence)

    def follow(self, sequence: Sequence, leader: Sequence) -> None:
        """The sequence goes on from a prompt that `leader` read for both: it borrows what it can of that, at least what
        `leader` does."""
        self.release(sequence)
        if self._blocks is not None and self._blocks.in_place and leader.reuse is not None:
            found, held = self._find(leader.reuse, leader.request.prompt_ids), leader.prefix or NOTHING
            self._hold(sequence, max(held, found, key=lambda prefix: prefix.num_tokens))

    def release(self, sequence: Sequence) -> None:
        """Nothing that was found for the sequence is needed any longer: it left its slot, or does not start."""
        if sequence.prefix is not None:
            self._let_go(sequence.prefix.blocks)
            sequence.prefix, sequence.borrowed = None, 0

    def prefilled(self, made: list[NewToken], counts: bool) -> None:
        """Note a prompt for caching, once the answers to its request have their first tokens. `counts`: whether the
        answer is still wanted."""
        leader = made[0][0]
        if leader.reuse is not None and not leader.resumes:
            if counts and not leader.prompt_read:
                self._count(leader)
            if all(token_id >= 0 for _, token_id, _ in made):  # else keys may not be finite
                self._note(leader, leader.reuse, leader.request.prompt_ids)
        for sequence, *_ in made:
            sequence.num_cached = 0

    def answered(self, sequence: Sequence) -> None:
        """Note prompt and answer, except its last token, of a sequence that leaves its slot."""
        if sequence.reuse is not None and sequence.reuse.until is None and sequence.prompt_in is None:
            self._note(sequence, sequence.reuse, sequence.prefill_ids[:-1])

    def keep(self) -> None:
        """Copy noted contents to the cache before slots are reused. Separate from the step that computed them, so as
        not to delay the first token."""
        if self._kept_epoch != self._epoch:
            self._kept_epoch = self._epoch
            for key in list(self._entries):
                self._drop(key)
        unkept = [one for one in self._unkept if not any(block.gone for block in one.borrowed)]
        self._unkept = []
        for one in unkept:  # making room for one must not take what the next begins with
            self._refer(one.borrowed)
        for one in unkept:
            self._keep(one)
            self._let_go(one.borrowed)

    def forget(self) -> None:
        """Invalidate everything read so far, also by requests that still run. From any thread."""
        self._epoch += 1

    def stats(self) -> dict[str, Any]:
        """Tokens queried, prompts with a hit, tokens saved, evictions; current blocks and bytes."""
        return {
            **self._counts,
            "blocks": len(self._entries),
            "used_bytes": self._used_bytes,
            "budget_bytes": self.budget_bytes,
            "bytes_by_adapter": dict(self._bytes_of),
        }

    def _find(self, reuse: Reuse, token_ids: list[int]) -> Prefix:
        """The blocks with the beginning of the prompt. At least its last token remains to be read."""
        found: list[PrefixEntry] = []
        keys: list[EntryKey] = []
        key, rows = reuse.key, None
        if key.conditioning:
            vectors = self._entries.get((key, b""))
            if vectors is None:
                return NOTHING
            keys.append((key, b""))
            rows = vectors.rows
        parent: PrefixKey | int = key
        for tokens in _blocks(token_ids[:-1][: reuse.until]):
            block = self._entries.get((parent, tokens))
            if block is None:
                break
            keys.append((parent, tokens))
            found.append(block)
            parent = block.number
        self._touch(keys)
        return Prefix(tuple(found), rows)

    def _hold(self, sequence: Sequence, prefix: Prefix) -> None:
        """The sequence begins with these until `release`."""
        assert self._blocks is not None, "nothing is found where nothing is kept"
        self._refer(prefix.blocks)
        sequence.prefix = prefix
        sequence.borrowed = prefix.num_tokens if self._blocks.in_place else 0

    def _refer(self, blocks: Iterable[PrefixEntry]) -> None:
        for block in blocks:
            block.refcount += 1

    def _let_go(self, blocks: Iterable[PrefixEntry]) -> None:
        for block in blocks:
            block.refcount -= 1
            if block.gone and not block.refcount:
                self._give_back(block)

    def _note(self, sequence: Sequence, reuse: Reuse, token_ids: list[int]) -> None:
        """Have `keep` keep these tokens of the sequence's, which its slot holds until then."""
        borrowed = () if sequence.prefix is None else sequence.prefix.blocks
        self._unkept.append(_Unkept(reuse, token_ids, sequence.slot, borrowed))

    def _count(self, leader: Sequence) -> None:
        """Count a prompt that was read for the first of its answers."""
        length = len(leader.request.prompt_ids)
        cached = min(leader.num_cached, length)
        self._counts["queried_tokens"] += length
        self._counts["hits"] += cached > 0
        self._counts["saved_tokens"] += cached
        for sequence in (leader, *leader.siblings):
            sequence.cached_tokens = cached

    def _keep(self, one: _Unkept) -> None:
        """Copy the whole blocks that are not cached yet, as many from the beginning as fit."""
        assert self._blocks is not None, "nothing is noted without a cache"
        key, until = one.reuse
        blocks = list(_blocks(one.token_ids[:until]))
        here: list[EntryKey] = []
        parent: PrefixKey | int = key
        for tokens in blocks:
            block = self._entries.get((parent, tokens))
            if block is None:
                break
            here.append((parent, tokens))
            parent = block.number
        first, rows, borrowed = len(here), (key, b""), len(one.borrowed)
        if first < borrowed:  # in another epoch
            return
        made: list[tuple[EntryKey, PrefixEntry]] = []
        if key.conditioning and rows in self._entries:
            here.insert(0, rows)
        for entry_key in here:  # evicting for the end must not remove the beginning
            self._entries[entry_key].refcount += 1
        if key.conditioning and blocks and rows not in here:
            vectors = self._take_rows(key, one.slot)
            if vectors is None:
                blocks = []
            else:
                made.append((rows, vectors))
        places = []
        for tokens in blocks[first:]:
            block = self._take_block(key.adapter)
            if block is None:
                break
            made.append(((parent, tokens), block))
            places.append(block.place)
            parent = block.number
        if places:
            self._blocks.save(one.slot, first - borrowed, places)
        for entry_key in here:
            self._entries[entry_key].refcount -= 1
        self._entries.update(made)  # from now on they are found
        keys = [*here, *(entry_key for entry_key, _ in made)]
        self._touch(sorted(keys, key=lambda entry_key: bool(entry_key[1])))

    def _take_block(self, adapter: str | None) -> PrefixEntry | None:
        """A place for a new block; None if there is none."""
        if not self._make_room(self._block_bytes):
            return None
        self._account(adapter, self._block_bytes)
        return PrefixEntry(adapter, self._block_bytes, next(self._numbers), heapq.heappop(self._free))

    def _take_rows(self, key: PrefixKey, slot: int) -> PrefixEntry | None:
        """The slot's vectors; None if they do not fit."""
        rows = self._rows_of(slot)
        nbytes = sum(row.nbytes for row in rows.values()) + len(key.conditioning) + OVERHEAD
        if not self._make_room(nbytes):
            return None
        self._account(key.adapter, nbytes)
        return PrefixEntry(key.adapter, nbytes, rows=rows)

    def _account(self, adapter: str | None, nbytes: int) -> None:
        self._used_bytes += nbytes
        self._bytes_of[adapter] += nbytes
        if not self._bytes_of[adapter]:
            del self._bytes_of[adapter]

    def _make_room(self, nbytes: int) -> bool:
        """Evict until `nbytes` more fit; False if referenced blocks prevent it."""
        while self._used_bytes + nbytes > self.budget_bytes:
            if not self._evict():
                return False
        return True

    def _evict(self) -> bool:
        """Drop the least recently used entry without references; False if there is none."""
        for _ in range(len(self._entries)):
            key = next(iter(self._entries))
            if not self._entries[key].refcount:
                self._drop(key)
                return True
            self._entries.move_to_end(key)  # is read now: passed over once, not for each block
        return False

    def _drop(self, key: EntryKey) -> None:
        """Let the entry not be found any more; its memory is free once nothing refers to it."""
        entry = self._entries.pop(key)
        entry.gone = True
        self._counts["evictions"] += 1
        if not entry.refcount:
            self._give_back(entry)

    def _give_back(self, entry: PrefixEntry) -> None:
        if entry.place >= 0:
            heapq.heappush(self._free, entry.place)
        self._account(entry.adapter, -entry.nbytes)

    def _touch(self, keys: list[EntryKey]) -> None:
        """Mark entries as used, the first one last: a block cannot be found without its parent."""
        for key in reversed(keys):
            self._entries.move_to_end(key)


def _blocks(token_ids: list[int]) -> Iterable[bytes]:
    """The tokens of each whole block."""
    every, size = token_bytes(token_ids), BLOCK * TOKEN_BYTES
    return (every[start : start + size] for start in range(0, len(every) - size + 1, size))


def token_bytes(token_ids: Iterable[int]) -> bytes:
    """The ids, four bytes each: equal bytes mean equal tokens."""
    return array("i", token_ids).tobytes()
