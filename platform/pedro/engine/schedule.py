"""Inputs and outputs of the scheduler: limits, KV room, a step's budget, a prefill in progress, one step.

How much a step may do while others wait, or may arrive, is derived from the costs of recent steps. A prompt cannot be
read token by token, since its last token determines its vectors; but it can be read in chunks, layer by layer, between
decode steps. A chunk should last at most `stall` decode steps, by recent costs of both. A short step is one that a
newcomer may have to wait for: it should last at most `PATIENCE` of the time that reading the newcomer's own prompt
takes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pedro.engine.sequence import Sequence

if TYPE_CHECKING:
    from pedro.engine.config import EngineConfig
    from pedro.engine.scheduler import Scheduler
    from pedro.engine.shares import Tenant

NEWS = 0.25  # weight of the newest measurement
LEAST_TOKENS = 4
LEAST_ROWS = 4  # in a short step: fewer would hardly make it shorter, since every step reads all weights
LONE_TOKENS = 512  # of a chunk while no sequence decodes
LONE = 2  # times `prefill_tokens`: what one prefill reads while no sequence runs
MOST_LENGTH = 8  # times `prefill_tokens`: what prompts of one prefill have together, with what is cached of them
PATIENCE = 0.15
SPARE = 16  # newcomers leave one block in this many free for running sequences
SHED = (
    "the server's queue is full, mostly of your requests, so your newest one was dropped in favour of another "
    "tenant's; try again later or send fewer at once"
)
PrefillGroup = tuple[Sequence, ...]  # these share one prefill: the first is read, the others copy it


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of the scheduler. `prefill_tokens` is the most prompt work per step, in tokens through all layers, and
    that of one prefill; while no sequence runs, a prefill reads more, since its sequences then decode together.

    A waiting tenant that is more than `preempt_after` weighted tokens behind a running one takes a slot from it.
    For `head_room_s` after a tenant's last request, capacity is reserved for its next one. Running sequences share
    `kv_blocks` blocks of `kv_block` tokens; a step may add up to `ahead` draft tokens to each beside the next one.
    """

    slots: int
    prefill_tokens: int = 2048
    max_waiting: int = 1024
    max_waiting_per_tenant: int = 256
    preempt_after: int = 1024
    head_room_s: float = 10.0
    weights: dict[str, float] = field(default_factory=dict)  # a tenant's share; 1 if not listed
    kv_blocks: int = sys.maxsize
    kv_block: int = 16
    ahead: int = 0

    def too_much(self, tokens: int, length: int, lone: bool) -> bool:
        """Whether one prefill should not read so many tokens, of prompts of this total length. `lone`: while nobody
        else runs."""
        most = self.prefill_tokens
        return tokens > (LONE * most if lone else most) or length > MOST_LENGTH * most

    @classmethod
    def of(cls, config: EngineConfig, kv_blocks: int, kv_block: int) -> SchedulerLimits:
        """The limits of an engine with this KV cache."""
        return cls(
            slots=config.max_batch,
            kv_blocks=kv_blocks,
            kv_block=kv_block,
            ahead=config.num_speculative_tokens if config.speculate != "off" else 0,
            prefill_tokens=config.prefill_tokens,
            max_waiting=config.max_waiting,
            max_waiting_per_tenant=config.max_waiting_per_tenant,
            preempt_after=config.preempt_after,
            head_room_s=config.head_room_s,
            weights=config.tenant_weights,
        )


class KVRoom:
    """Accounting of KV blocks: how many sequences with slots may use, and how many are free."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._blocks, self._block, self._ahead = limits.kv_blocks, limits.kv_block, limits.ahead
        self.used = 0

    def short(self, running: list[Sequence]) -> list[Sequence]:
        """Sequences that may need more blocks than they have."""
        step = 1 + self._ahead
        return [
            s for s in running if s.length + step - s.borrowed > s.blocks * self._block and self._needs(s) > s.blocks
        ]

    def trim(self, running: Iterable[Sequence]) -> None:
        """Free the blocks of prompts that were to be copied and are read in place, since they are kept by now."""
        for sequence in running:
            more = sequence.blocks - self._needs(sequence) if sequence.borrowed else 0
            if more > 0:
                sequence.blocks -= more
                self.used -= more

    def growing(self, running: Iterable[Sequence]) -> int:
        """How many sequences may come to need more blocks."""
        return sum(self._most(s) * s.width > s.blocks * self._block for s in running)

    def missing(self, sequence: Sequence, others: int = 0) -> int:
        """How many blocks are missing for the sequence to continue, or to start beside `others` that grow: a few are
        left to these, which will need more soon."""
        spare = min(others, max(1, self._blocks // SPARE))
        return self._needs(sequence) - sequence.blocks + spare - (self._blocks - self.used)

    def take(self, sequence: Sequence) -> None:
        """Reserve blocks: the sequence starts or continues."""
        more = max(0, self._needs(sequence) - sequence.blocks)
        sequence.blocks += more
        self.used += more

    def give_back(self, sequence: Sequence) -> None:
        """Free its blocks: it ends or is preempted."""
        self.used -= sequence.blocks
        sequence.blocks = 0

    def _needs(self, sequence: Sequence) -> int:
        """Blocks for its tokens and the next step's; for beams, which are never preempted, for all that they may
        generate. An answer's last token is not stored, and borrowed tokens are stored elsewhere."""
        most = self._most(sequence)
        next_step = sequence.length + 1 + self._ahead - sequence.borrowed
        tokens = most if sequence.width > 1 else min(most, next_step)
        return sequence.width * -(-tokens // self._block)

    def _most(self, sequence: Sequence) -> int:
        """The most tokens that one of its slots will have."""
        return len(sequence.request.prompt_ids) + max(0, sequence.max_tokens - 1) - sequence.borrowed


class PrefillBudget:
    """Moving averages of the seconds per decode step and per prompt token."""

    def __init__(self, stall: float) -> None:
        self._stall = stall
        self._step_s: float | None = None
        self._row_s: float | None = None
        self._token_s: float | None = None

    def record_decode(self, seconds: float, rows: int) -> None:
        """A decode step of `rows` rows took `seconds`."""
        self._step_s = _mean(self._step_s, seconds)
        if rows >= LEAST_ROWS:
            self._row_s = _mean(self._row_s, seconds / rows)

    def record_prefill(self, tokens: int, seconds: float) -> None:
        """`tokens` tokens' worth of a prefill, through all layers, took `seconds`."""
        if tokens > 0:
            self._token_s = _mean(self._token_s, seconds / tokens)

    @contextmanager
    def timed(self, part: PrefillChunk, scheduler: Scheduler) -> Iterator[None]:
        """Measure a chunk's cost and derive the size of the next."""
        began = time.perf_counter()
        yield
        self.record_prefill(part.until - part.since, time.perf_counter() - began)
        scheduler.chunk_tokens = self.chunk_tokens(scheduler.limits.prefill_tokens)
        self.keep_steps_short(scheduler)

    def chunk_tokens(self, most: int) -> int:
        """The size of the next chunk: at most `most` tokens' worth, and exactly that until both costs are known."""
        if self._step_s is None or not self._token_s:
            return most
        return max(LEAST_TOKENS, min(most, int(self._stall * self._step_s / self._token_s)))

    def keep_steps_short(self, scheduler: Scheduler) -> None:
        """Set what fits into a short step, and what a step is worth, from recent costs."""
        prompt, limits = scheduler.newcomer_tokens, scheduler.limits
        if self._step_s is not None and self._token_s:
            scheduler.step_tokens = self._step_s / self._token_s
        if prompt is not None:
            scheduler.short_tokens = self.short_tokens(prompt, limits.prefill_tokens)
            scheduler.short_rows = self.short_rows(prompt, limits.slots)

    def short_tokens(self, prompt: float, most: int) -> int:
        """The chunk of a short step, if newcomers' prompts have about `prompt` tokens."""
        return max(LEAST_TOKENS, min(most, int(PATIENCE * prompt)))

    def short_rows(self, prompt: float, most: int) -> int:
        """The rows of a short step: as many as fit by their recent cost, which settles within a few steps."""
        if self._row_s is None or self._token_s is None:
            return most
        return max(LEAST_ROWS, min(most, int(PATIENCE * prompt * self._token_s / self._row_s)))


@dataclass
class PrefillProgress:
    """A prefill in progress, and how many tokens' worth of it are done."""

    groups: tuple[PrefillGroup, ...]
    tenants: tuple[Tenant, ...]
    done: int = 0

    @property
    def tokens(self) -> int:
        return sum(group[0].unread for group in self.groups)


@dataclass(frozen=True)
class PrefillChunk:
    """A chunk of the prefill of `groups`: from `since` to `until` tokens' worth of work, through all layers."""

    groups: tuple[PrefillGroup, ...]
    since: int
    until: int
    ends: bool

    @property
    def begins(self) -> bool:
        return self.since == 0

    @property
    def sequences(self) -> list[Sequence]:
        return [sequence for group in self.groups for sequence in group]


@dataclass(frozen=True)
class SchedulerOutput:
    """One step: at most one chunk of one prefill, and a token for all running sequences or as many as fit.

    First, the slots of `preempted` must be saved: each sequence still lists the slots it lost.
    """

    prefill: PrefillChunk | None
    decode: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...] = ()

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + NEWS * (now - before)
