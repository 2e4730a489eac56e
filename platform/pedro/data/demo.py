"""The packaged demo tenants: who they are and where their files lie. Knows nothing of how they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ASSETS = Path(__file__).parents[1] / "assets" / "demo"


@dataclass(frozen=True)
class DemoTenant:
    """One tenant with one task. `labels` are all the answers there are; `licence` is that of the rows."""

    name: str
    adapter: str
    title: str
    labels: tuple[str, ...]
    licence: str

    @property
    def train(self) -> Path:
        return _ASSETS / self.name / "train.jsonl"

    @property
    def test(self) -> Path:
        return _ASSETS / self.name / "test.jsonl"


DEMO_TENANTS: tuple[DemoTenant, ...] = ()
