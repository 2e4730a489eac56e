"""The packaged demo tenants: who they are, what is asked of their rows, and where their files lie.

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
    """One tenant with one task. `labels` are all the answers of few words; `licence` is that of the rows.

    `task` names the benchmark task (`pedro.data.tasks`) whose parser and metric judge the answers; `template` is the
    text that its wording has around a prompt.
    """

    name: str
    adapter: str
    title: str
    task: str
    template: str
    labels: tuple[str, ...]
    licence: str
    folder: str = ""
    """Where the files lie, if not in a folder of the tenant's name."""

    @property
    def train(self) -> Path:
        return _ASSETS / (self.folder or self.name) / "train.jsonl"

    @property
    def test(self) -> Path:
        return _ASSETS / (self.folder or self.name) / "test.jsonl"


ACME = DemoTenant(
    "acme",
    "voice",
    "Voice commands: which of 7 intents (SNIPS)",
    "snips",
    "Text: {prompt}\nIntent:",
    ("add", "book", "find", "movie", "play", "rate", "weather"),
    "CC0-1.0",
)
DEMO_TENANTS: tuple[DemoTenant, ...] = (  # for a backbone with few words: short prompts, answers of one word
    ACME,
    DemoTenant(
        "globex",
        "assistant",
        "Assistant queries: which of 10 domains (CLINC150)",
        "clinc_domains",
        "Text: {prompt}\nDomain:",
        ("auto", "bank", "card", "home", "kitchen", "meta", "small talk", "travel", "utility", "work"),
        "CC-BY-3.0",
    ),
    DemoTenant(
        "initech",
        "support",
        "Bank customers' questions: which of 10 intents (Banking77)",
        "banking77",
        "Text: {prompt}\nIntent:",
        ("age", "close", "delivery", "edit", "lost", "pin", "rate", "spare", "timing", "wallet"),
        "CC-BY-4.0",
    ),
)
CHAT_TENANTS: tuple[DemoTenant, ...] = (  # for a language model that can be told what to do
    ACME,
    DemoTenant(
        "globex",
        "reader",
        "Questions about a passage, answered in its words (SQuAD)",
        "squad",
        "{prompt}\nAnswer:",
        (),
        "CC-BY-SA-4.0",
        "globex-reader",
    ),
    DemoTenant(
        "initech",
        "support",
        "Bank customers' questions: which of 77 intents (Banking77)",
        "banking77_all",
        "Text: {prompt}\nIntent:",
        (),
        "CC-BY-4.0",
        "initech-77",
    ),
)


def demo_tenant(name: str) -> DemoTenant:
    """The tenant of the small demo called `name`. Raises NotFoundError with the names there are."""
    for tenant in DEMO_TENANTS:
        if tenant.name == name:
            return tenant
    names = ", ".join(tenant.name for tenant in DEMO_TENANTS)
    raise NotFoundError(f"demo tenant: there is no {name!r}; choose one of {names}", param="tenant")
