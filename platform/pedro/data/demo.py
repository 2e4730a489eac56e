"""The packaged demo tenants: who they are and where their files lie.

Made from public data by `jobs/build_demo_data.py`; each folder holds its LICENSE and NOTICE. Test rows come from
the source's own test part, and no prompt of theirs is in the training file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pedro.errors import NotFoundError

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


DEMO_TENANTS: tuple[DemoTenant, ...] = (
    DemoTenant(
        "acme",
        "voice",
        "Voice commands: which of 7 intents (SNIPS)",
        ("add", "book", "find", "movie", "play", "rate", "weather"),
        "CC0-1.0",
    ),
    DemoTenant(
        "globex",
        "assistant",
        "Assistant queries: which of 10 domains (CLINC150)",
        ("auto", "bank", "card", "home", "kitchen", "meta", "small talk", "travel", "utility", "work"),
        "CC-BY-3.0",
    ),
    DemoTenant(
        "initech",
        "support",
        "Bank customers' questions: which of 10 intents (Banking77)",
        ("age", "close", "delivery", "edit", "lost", "pin", "rate", "spare", "timing", "wallet"),
        "CC-BY-4.0",
    ),
)


def demo_tenant(name: str) -> DemoTenant:
    """The tenant called `name`. Raises NotFoundError with the names there are."""
    for tenant in DEMO_TENANTS:
        if tenant.name == name:
            return tenant
    names = ", ".join(tenant.name for tenant in DEMO_TENANTS)
    raise NotFoundError(f"demo tenant: there is no {name!r}; choose one of {names}", param="tenant")
