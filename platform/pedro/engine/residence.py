"""The life of an adapter in the pool, as a table of moves. Knows nothing of budgets, loads or threads."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pedro.errors import PedroError


class Loadable(Protocol):
    """What the pool needs to know of an adapter."""

    @property
    def nbytes(self) -> int: ...


A = TypeVar("A", bound=Loadable)


class Residence(enum.Enum):
    """Where an adapter is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


_NEXT = {
    Residence.LOADING: {Residence.READY, Residence.GONE},
    Residence.READY: {Residence.DRAINING, Residence.GONE},
    Residence.DRAINING: {Residence.GONE},
    Residence.GONE: set(),
}


class Entry(Generic[A]):
    """One stay of one adapter in the pool."""

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self.state = Residence.LOADING
        self.adapter: A | None = None
        self.nbytes = 0
        self.pins = 0
        self.uses = 0

    def to(self, state: Residence) -> None:
        """Move to `state`; a move that the table does not hold is a bug of the pool."""
        assert state in _NEXT[self.state], f"adapter {self.ref}: {self.state} → {state}"
        self.state = state
        if state is Residence.GONE:
            self.adapter, self.nbytes = None, 0


@dataclass
class Failure:
    """Why a load failed, how often in a row, and when it may be tried again."""

    error: PedroError
    times: int
    retry_at: float
