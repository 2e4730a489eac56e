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
memory given back then. What goes where room is needed, and how much may be read in place, is for `prefix_entries`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pedro.engine.kv_blocks import BLOCK, block_bytes
from pedro.engine.prefix_entries import PrefixEntries, PrefixEntry

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter
    from pedro.engine.modulation import SlotRows
    from pedro.engine.request import Request
    from pedro.engine.runner import Runner
    from pedro.engine.sequence import Sequence
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


@dataclass(frozen=True)
class Prefix:
    """The cached beginning of a prompt: its blocks, and the vectors if they depend on the prompt."""

    blocks: tuple[PrefixEntry, ...] = ()
    vectors: PrefixEntry | None = None

    @property
    def rows(self) -> SlotRows | None:
        return None if self.vectors is None else self.vectors.rows

    @property
    def entries(self) -> tuple[PrefixEntry, ...]:
        return self.blocks if self.vectors is None else (self.vectors, *self.blocks)

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(block.place for block in self.blocks)

    @property
    def num_tokens(self) -> int:
        return BLOCK * len(self.blocks)


NOTHING = Prefix()


@dataclass(frozen=True)
class _Unkept:
    """What a slot holds until the next step and is to be kept, but for what it borrows."""

    reuse: Reuse
    token_ids: list[int]
    slot: int
    borrowed: tuple[PrefixEntry, ...] = ()


class PrefixCache:
    """A cache of `budget_bytes`; if these are less than one block, nothing is cached."""

    def __init__(self, runner: Runner, budget_bytes: int, share_bare: bool = False) -> None:
        self._block_bytes = block_bytes(runner.cache) + OVERHEAD
        self._rows_of, self._share_bare = runner.slot_rows, share_bare
        count = budget_bytes // self._block_bytes
        self._blocks = runner.make_blocks(count) if count else None
        self._entries = PrefixEntries(budget_bytes, count)
        self._unkept: list[_Unkept] = []
        self._epoch, self._next_epoch = 0, 0
        self._counts = dict.fromkeys(("queried_tokens", "hits", "saved_tokens"), 0)

    def foresee(self, sequence: Sequence, adapter: Adapter | None) -> None:
        """What `look_up` would find now for a sequence that waits: sets `num_cached` and `borrowed`, and holds
        nothing."""
        if sequence.prefix is None:
            found = self._found(sequence, adapter)
            sequence.num_cached, sequence.borrowed = found.num_tokens, self._readable(found)

    def look_up(self, sequence: Sequence, adapter: Adapter | None) -> None:
        """Before the sequence starts: what its prefill need not read, held until `begun` or `release`. A prompt whose
        log-probabilities, or mean, are asked for is read whole: they need the state of every token."""
        self.release(sequence)
        found = self._found(sequence, adapter)
        sequence.foreseen = None
        sequence.num_cached, sequence.borrowed = found.num_tokens, self._readable(found)
        self._hold(sequence, found)

    def begun(self, sequences: Iterable[Sequence]) -> None:
        """The prefill of these began: their slots hold what was found, but for what they read in place."""
        for sequence in sequences:
            if sequence.prefix is not None and sequence.borrowed < sequence.prefix.num_tokens:
                self._hold(sequence, _first(sequence.prefix, sequence.borrowed))

    def follow(self, sequence: Sequence, leader: Sequence) -> None:
        """The sequence goes on from a prompt that `leader` read for both: it borrows what it can of that, at least what
        `leader` does."""
        self.release(sequence)
        if self._blocks is not None and self._blocks.in_place and leader.reuse is not None:
            found = self._find(leader.reuse, leader.request.prompt_ids)
            prefix = max(leader.prefix or NOTHING, _first(found, self._readable(found)), key=lambda one: one.num_tokens)
            self._hold(sequence, prefix)
            sequence.borrowed = prefix.num_tokens

    def release(self, sequence: Sequence) -> None:
        """Nothing that was found for the sequence is needed any longer: it left its slot, or does not start."""
        self._hold(sequence, NOTHING)
        sequence.borrowed = 0

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
        unkept = [one for one in self._unkept if not any(block.gone for block in one.borrowed)]
        self._unkept = []
        for one in unkept:  # making room for one must not take what the next begins with
            self._entries.refer(one.borrowed)
        for one in unkept:
            self._keep(one)
            self._entries.let_go(one.borrowed)

    def forget(self) -> None:
        """Invalidate everything read so far, also by requests that still run. From any thread."""
        self._next_epoch += 1

    def plan(self) -> None:
        """Before a step is planned, under the engine's lock: what was forgotten is not found from here on."""
        if self._epoch != self._next_epoch:
            self._epoch = self._next_epoch
            for entry in self._entries.all():
                self._entries.drop(entry)

    def stats(self) -> dict[str, Any]:
        """Tokens queried, prompts with a hit, tokens saved, evictions; current blocks and bytes."""
        return {
            **self._counts,
            "evictions": self._entries.evictions,
            "blocks": len(self._entries),
            "used_bytes": self._entries.used_bytes,
            "held_bytes": self._entries.held_bytes,
            "budget_bytes": self._entries.budget_bytes,
            "bytes_by_adapter": dict(self._entries.bytes_by_adapter),
        }

    def _found(self, sequence: Sequence, adapter: Adapter | None) -> Prefix:
        """What is kept of the sequence's beginning. Asked again while it waits, it looks only if something changed."""
        if self._blocks is None:
            return NOTHING
        if sequence.reuse is None or (sequence.reuse.key.epoch != self._epoch and not sequence.resumes):
            sequence.reuse = reuse_of(sequence.request, adapter, self._epoch, self._share_bare)
        elif sequence.foreseen is not None and sequence.foreseen[0] == self._entries.changes:
            return sequence.foreseen[1]
        whole = sequence.params.prompt_logprobs is not None or sequence.params.pooling == "mean"
        found = NOTHING if whole and not sequence.resumes else self._find(sequence.reuse, sequence.prefill_ids)
        sequence.foreseen = self._entries.changes, found
        return found

    def _find(self, reuse: Reuse, token_ids: list[int]) -> Prefix:
        """The blocks with the beginning of the prompt. At least its last token remains to be read."""
        if len(token_ids) <= BLOCK:
            return NOTHING
        found: list[PrefixEntry] = []
        parent: PrefixKey | int = reuse.key
        vectors = self._entries.get((parent, b"")) if reuse.key.conditioning else None
        if reuse.key.conditioning and vectors is None:
            return NOTHING
        for tokens in _blocks(token_ids[:-1][: reuse.until]):
            block = self._entries.get((parent, tokens))
            if block is None:
                break
            found.append(block)
            parent = block.number
        return Prefix(tuple(found), vectors) if found else NOTHING

    def _readable(self, prefix: Prefix) -> int:
        """How many of its tokens may be read in place, for as long as a request runs."""
        if self._blocks is None or not self._blocks.in_place or not prefix.blocks:
            return 0
        return BLOCK * max(0, self._entries.readable(prefix.entries) - (prefix.vectors is not None))

    def _hold(self, sequence: Sequence, prefix: Prefix) -> None:
        """The sequence begins with these until it holds others, or none."""
        before, sequence.prefix = sequence.prefix, prefix if prefix.blocks else None
        if prefix.blocks:
            self._entries.refer(prefix.entries)
        if before is not None:
            self._entries.let_go(before.entries)

    def _note(self, sequence: Sequence, reuse: Reuse, token_ids: list[int]) -> None:
        """Have `keep` keep these tokens of the sequence's, which its slot holds until then."""
        if len(token_ids) >= BLOCK:
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
        here: list[PrefixEntry] = []
        new = list(_blocks(one.token_ids[:until]))
        if key.conditioning and new and (vectors := self._entries.get((key, b""))) is not None:
            here.append(vectors)
        have_vectors = bool(here) or not key.conditioning
        parent: PrefixKey | int = key
        first = 0
        while first < len(new) and (block := self._entries.get((parent, new[first]))) is not None:
            here.append(block)
            parent, first = block.number, first + 1
        borrowed = len(one.borrowed)
        if first < borrowed:  # in another epoch
            return
        self._entries.refer(here)  # evicting for the end must not remove the beginning
        made = [] if have_vectors or not new else self._take_vectors(key, one.slot)
        places = []
        for tokens in new[first:] if have_vectors or made else ():
            taken = self._entries.take((parent, tokens), key.tenant, key.adapter, self._block_bytes)
            if taken is None:
                break
            made.append(taken)
            places.append(taken.place)
            parent = taken.number
        if places:
            self._blocks.save(one.slot, first - borrowed, places)
        self._entries.add(made)
        self._entries.let_go(here)

    def _take_vectors(self, key: PrefixKey, slot: int) -> list[PrefixEntry]:
        """The slot's vectors; empty if they do not fit."""
        rows = self._rows_of(slot)
        nbytes = sum(row.nbytes for row in rows.values()) + len(key.conditioning) + OVERHEAD
        taken = self._entries.take((key, b""), key.tenant, key.adapter, nbytes, rows)
        return [] if taken is None else [taken]


def _first(prefix: Prefix, tokens: int) -> Prefix:
    """Its first tokens, of whole blocks."""
    return Prefix(prefix.blocks[: tokens // BLOCK], prefix.vectors) if tokens else NOTHING


def _blocks(token_ids: list[int]) -> Iterable[bytes]:
    """The tokens of each whole block."""
    every, size = token_bytes(token_ids), BLOCK * TOKEN_BYTES
    return (every[start : start + size] for start in range(0, len(every) - size + 1, size))


def token_bytes(token_ids: Iterable[int]) -> bytes:
    """The ids, four bytes each: equal bytes mean equal tokens."""
    return array("i", token_ids).tobytes()
