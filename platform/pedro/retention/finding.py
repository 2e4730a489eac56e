"""What the collector found in the home: a thing that is removed or kept, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing. `remove` is None where it stays; called, it says whether the thing went after all."""

    kind: str
    name: str
    bytes: int
    reason: str
    remove: Callable[[], bool] | None = None

    @property
    def goes(self) -> bool:
        return self.remove is not None
