"""The life cycle of an adapter in the pool: its state machine, and the entry of each adapter."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from pedro.errors import PedroError


class Loadable(Protocol):
    """Anything that can be pooled: it has a size."""

    @property
    def nbytes(self) -> int: ...


A = TypeVar("A", bound=Loadable)


class AdapterState(enum.Enum):
    """State of an adapter."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


_NEXT = {
    AdapterState.LOADING: {AdapterState.READY, AdapterState.GONE},
    AdapterState.READY: {AdapterState.DRAINING, AdapterState.GONE},
    AdapterState.DRAINING: {AdapterState.GONE},
    AdapterState.GONE: set(),
}


class PooledAdapter(Generic[A]):
    """One adapter in the pool, from its load to its end."""

    def __init__(self, ref: str) -> None:
        self.ref = ref
        self.state = AdapterState.LOADING
        self.adapter: A | None = None
        self.nbytes = 0
        self.refcount = 0  # requests that hold it
        self.total_uses = 0  # acquisitions
        self.retry_until: float | None = None  # when to give up, by `time.monotonic()`; None until a load failed

    def to(self, state: AdapterState) -> None:
        """Move to `state`; any other transition is a bug of the pool."""
        assert state in _NEXT[self.state], f"adapter {self.ref}: {self.state} → {state}"
        self.state = state
        if state is AdapterState.GONE:
            self.adapter, self.nbytes = None, 0


@dataclass(frozen=True)
class ResidentAdapter:
    """What the pool reports about an adapter. `pinned`: kept by an operator."""

    state: AdapterState
    nbytes: int
    refcount: int
    total_uses: int
    pinned: bool


@dataclass
class Failure:
    """Why a load failed, how often in a row, and when it may be retried."""

    error: PedroError
    times: int
    retry_at: float
