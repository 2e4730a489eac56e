"""A home as the demo leaves it, written through the real registry with made-up numbers. No page is involved."""

from __future__ import annotations

import atexit
import json
import math
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from serving_adapters import stub_adapter

from pedro.config import Settings
from pedro.registry import Registry

TENANTS = (
    ("acme", "intents", "Intent of a voice command", 0.16, 0.00, 0.93),
    ("globex", "topics", "Topic of a question", 0.13, 0.02, 0.62),
    ("initech", "tone", "Tone of a review", 0.51, 0.00, 0.78),
)


def copy_of_home(home: Path) -> Path:
    """A copy of a home as `make_home` leaves it, which a test may break; the first one is made, which takes seconds."""
    return shutil.copytree(_made(), home)


@cache
def _made() -> Path:
    folder = tempfile.mkdtemp(prefix="pedro-dashboard-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_home(Path(folder) / "home").home


def make_home(home: Path) -> Settings:
    """Two versions of the first adapter and one of each other, with curves, aliases and the demo's result."""
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    registry = Registry.open(settings)
    for tenant, adapter, _, majority, _, accuracy in TENANTS:
        for attempt in (1, 2) if tenant == "acme" else (1,):
            run = registry.start_run(experiment=tenant, name=f"{tenant}.{adapter}", params={"lr": 1e-2}, tags={})
            for step in range(10, 301, 10):
                loss = 0.2 + 2.6 * math.exp(-step * attempt / 90) + 0.1 * (1 - accuracy) * math.sin(step)
                values = {"train/loss": loss, "train/theta_loss": loss * 1.1, "train/tokens_per_second": 5200 + step}
                registry.log_metrics(run, step, values)
                if step % 50 == 0:
                    registry.log_metrics(run, step, {"dev/loss": loss + majority / 4})
            made = registry.register(
                run, _adapter(home / "made" / f"{tenant}-{attempt}", tenant, attempt, accuracy), tenant, adapter
            )
            if attempt == 1:
                registry.promote(made.name, made.version)
            registry.finish_run(run)
    registry.promote("acme.intents", 2)
    write_result(home, result())
    return settings


def result() -> dict[str, Any]:
    """What `make demo` writes."""
    return {
        "created": "2026-11-20T12:00:00Z",
        "seconds": 312.4,
        "backbone": "pedro-nano",
        "tenants": [
            {
                "tenant": tenant,
                "adapter": adapter,
                "title": title,
                "rows": 1400,
                "steps": 300,
                "seconds": 58.2,
                "trainable_parameters": 21320,
                "test_rows": 400,
                "metric": "accuracy",
                "zero_shot": backbone,
                "few_shot": backbone + 0.2 if tenant == "acme" else None,
                "majority": majority,
                "score": accuracy,
                "version": 2 if tenant == "acme" else 1,
                "digest": "sha256:" + "0" * 64,
                "aliases": ["champion"],
                "run_id": "r",
            }
            for tenant, adapter, title, majority, backbone, accuracy in TENANTS
        ],
        "swap": {
            "model": "acme.intents",
            "old_version": 1,
            "new_version": 2,
            "requests": 1312,
            "in_flight": 16,
            "failed": 0,
            "mixed": 0,
            "answered_by_old": 421,
            "answered_by_new": 891,
            "seconds_to_first_new": 0.41,
            "old_accuracy": 0.71,
            "new_accuracy": 0.93,
        },
    }


def write_result(home: Path, tree: Any) -> Path:
    """`demo/result.json` of a home; text is written as it is."""
    path = home / "demo" / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return path


def _adapter(directory: Path, tenant: str, attempt: int, accuracy: float) -> Path:
    return stub_adapter(
        directory,
        f"{tenant}-{attempt}",
        "sha256:bb",
        backbone={"id": "stories260K", "digest": "sha256:bb"},
        metrics={"accuracy": accuracy - 0.22 * (attempt == 1 and tenant == "acme")},
        trainable_parameters=21320,
    )
