"""What bounds the scheduler, a prefill in progress, and one step as it is returned. `scheduler` makes the decisions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pedro.engine.sequence import Sequence

if TYPE_CHECKING:
    from pedro.engine.shares import Tenant

SHED = (
    "the server's queue is full and most that waits in it is yours, so your newest request gave way to another "
    "tenant's; try again later or send fewer at once"
)
PrefillGroup = tuple[Sequence, ...]  # share one prefill: the first is read, the others copy it


@dataclass(frozen=True)
class SchedulerLimits:
    """Bounds of the schedule. `prefill_tokens` is the most prompt work of one step, in tokens through all layers.

    A waiting tenant that is more than `preempt_after` weighted tokens behind a running one takes a slot from it.
    For `head_room_s` after a tenant's last request capacity is reserved for its next one.
    """

    slots: int
    prefill_tokens: int = 2048
    max_waiting: int = 1024
    max_waiting_per_tenant: int = 256
    preempt_after: int = 1024
    head_room_s: float = 10.0
    weights: dict[str, float] = field(default_factory=dict)  # a tenant's share; 1 where not named


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
    """A part of the prefill of `groups`: from `since` to `until` tokens' worth of work, through all layers."""

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
    """One step: at most one chunk of one prefill, and a token for running sequences, all or as many as fit now.

    Before all that the slots of `preempted` must be saved: each sequence still names the slots it lost.
    """

    prefill: PrefillChunk | None
    decode: tuple[Sequence, ...]
    preempted: tuple[Sequence, ...] = ()

    def __bool__(self) -> bool:
        return self.prefill is not None or bool(self.decode)
