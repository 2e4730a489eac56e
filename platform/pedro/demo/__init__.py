"""The demo: three tenants' files become three adapters on one backbone, served and hot-swapped. The story only.

Everything goes the way a user's own would: spec → Ray job → MLflow registry → Ray Serve → HTTP with API keys.
"""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pedro import cluster
from pedro.backbone import resolve_backbone
from pedro.config import Settings, validate_spec
from pedro.data.demo import DEMO_TENANTS, DemoTenant
from pedro.data.row_shapes import Example, parse_line
from pedro.demo.tenant_client import Swap, accuracy, swap_under_load
from pedro.errors import PedroError
from pedro.provenance import provenance
from pedro.refs import ModelRef
from pedro.registry import Registry, Version
from pedro.serving.config import ServeConfig
from pedro.serving.deploy import Served, deploy, end, find
from pedro.store import Store
from pedro.training.spec import FineTuneSpec
from pedro.training.submit import submit, wait

BACKBONE = "stories260K"
Log = Callable[[str], None]
Outcome = Future[None]
# Steps of each tenant's versions: the first trains twice, briefly and then well, so that there is something to swap.
STEPS = ((60, 300), (300,), (150,))


def run_demo(settings: Settings, *, keep: bool, port: int, log: Log) -> dict[str, Any]:
    """Run the story and return what `demo/result.json` of the home holds too. Adapters of an earlier run are reused."""
    started = time.monotonic()
    registry, store = Registry.open(settings), Store(settings.database_url)
    connected = cluster.connect(settings, log)
    jobs = _train_missing(settings, registry, store, connected.dashboard_url, log)
    keys, secrets = _keys(store)
    try:
        served = find(settings) or deploy(settings, ServeConfig(backbone=BACKBONE, threads=1), port=port, log=log)
        for outcome in jobs:
            outcome.result()
        log("\nasking every held-out row over HTTP: the bare backbone, then the adapter")
        swapped = DEMO_TENANTS[0]
        old, new = registry.versions(_name(swapped))[:2]
        registry.promote(old.name, old.version)
        time.sleep(2)  # the server follows within its watch interval
        rows = {tenant.name: _rows(tenant.test) for tenant in DEMO_TENANTS}
        tenants = [
            _measure(served, secrets[t.name], t, registry.get(_name(t)), rows[t.name], log) for t in DEMO_TENANTS
        ]
        log(f"\nhot swap: {old.ref} → {new.ref} while requests run")
        load = rows[swapped.name]
        seen = swap_under_load(served.url, secrets[swapped.name], secrets["*"], old.name, new.version, load)
        swap = _swap_report(old, new, seen)
        swap["old_accuracy"] = tenants[0]["accuracy"]
        tenants[0] = _measure(served, secrets[swapped.name], swapped, registry.get(old.name), load, log)
        swap["new_accuracy"] = tenants[0]["accuracy"]
        result = {
            **provenance(),
            "seconds": round(time.monotonic() - started, 1),
            "backbone": BACKBONE,
            "backbone_digest": resolve_backbone(BACKBONE).digest,
            "tenants": tenants,
            "swap": swap,
        }
        _save(settings.home / "demo" / "result.json", result)
        _show(result, log)
        _farewell(served, secrets[DEMO_TENANTS[0].name], load[0], keep, log)
    finally:
        if not keep:
            for key in keys:
                store.revoke_key(key)
            end(settings)
    problems = _problems(result)
    if problems:
        raise PedroError("the demo did not reach its marks: " + "; ".join(problems))
    return result


def demo_spec(tenant: DemoTenant, steps: int) -> FineTuneSpec:
    """The spec that trains a demo tenant's adapter for `steps`."""
    spec = {
        "tenant": tenant.name,
        "adapter": tenant.adapter,
        "backbone": BACKBONE,
        "data": {"train": str(tenant.train), "test": str(tenant.test)},
        "method": {"name": "pedro", "r": 12},
        "training": {
            "epochs": 100,
            "max_steps": steps,
            "lr": 2e-2,
            "theta_lr": 1e-3,
            "theta_every": 5,
            "batch_size": 32,
            "eval_every": 50,
            "patience": 100,
        },
        "resources": {"workers": 1},
    }
    return validate_spec(spec, FineTuneSpec, source=f"demo tenant {tenant.name}")


def _train_missing(settings: Settings, registry: Registry, store: Store, dashboard_url: str, log: Log) -> list[Outcome]:
    """Start the trainings whose versions are not there: tenants side by side, one CPU each, a tenant's in turn."""
    digest = resolve_backbone(BACKBONE).digest

    def train(tenant: DemoTenant, runs: Sequence[int]) -> None:
        for steps in runs:
            job = submit(demo_spec(tenant, steps), settings, dashboard_url, store)
            log(f"{_name(tenant)}: {tenant.title}; job {job} trains {steps} steps")
            wait(job, dashboard_url, lambda line: log(f"  {_name(tenant):<16} {line}"), store)

    outcomes = []
    threads = ThreadPoolExecutor(max_workers=len(STEPS), thread_name_prefix="demo")
    for tenant, runs in zip(DEMO_TENANTS, STEPS, strict=True):
        have = [v for v in registry.versions(_name(tenant)) if v.backbone_digest == digest]
        if have:
            log(f"{_name(tenant)}: there already: {', '.join(version.ref for version in have)}")
        outcomes.append(threads.submit(train, tenant, runs[len(have) :]))
    threads.shutdown(wait=False)
    return outcomes


def _keys(store: Store) -> tuple[list[str], dict[str, str]]:
    """One key a tenant and one for the operator ("*"): their ids, and their secrets by tenant."""
    ids, secrets = [], {}
    for tenant in DEMO_TENANTS:
        record, secrets[tenant.name] = store.create_key(tenant.name, ["infer"], "demo")
        ids.append(record.id)
    record, secrets["*"] = store.create_key("operator", ["admin"], "demo")
    return [*ids, record.id], secrets


def _measure(
    served: Served, secret: str, tenant: DemoTenant, version: Version, rows: Sequence[Example], log: Log
) -> dict[str, Any]:
    log(f"  {version.ref}: {len(rows)} rows")
    labels = Counter(row.completion for row in rows)
    return {
        "tenant": tenant.name,
        "adapter": tenant.adapter,
        "title": tenant.title,
        "rows": version.metrics.get("train_rows"),
        "steps": version.metrics.get("steps"),
        "seconds": version.metrics.get("seconds"),
        "trainable_parameters": version.trainable_parameters,
        "test_rows": len(rows),
        "backbone_accuracy": accuracy(served.url, secret, served.backbone, rows),
        "majority_accuracy": labels.most_common(1)[0][1] / len(rows),
        "accuracy": accuracy(served.url, secret, version.name, rows),
        "version": version.version,
        "digest": version.digest,
        "aliases": list(version.aliases),
        "run_id": version.run_id,
    }


def _swap_report(old: Version, new: Version, seen: Swap) -> dict[str, Any]:
    answered = {version.version: 0 for version in (old, new)}
    for fingerprint, count in seen.answers.items():
        answered[ModelRef.parse(fingerprint).number] += count
    return {
        "model": old.name,
        "old_version": old.version,
        "new_version": new.version,
        "requests": seen.requests,
        "in_flight": seen.in_flight,
        "failed": seen.failed,
        "mixed": seen.mixed,
        "answered_by_old": answered[old.version],
        "answered_by_new": answered[new.version],
        "seconds_to_first_new": seen.seconds_to_first_new,
    }


def _problems(result: dict[str, Any]) -> list[str]:
    """What the demo promises and this run did not show."""
    problems = [
        f"{row['tenant']}.{row['adapter']} is only {row['accuracy'] - row['majority_accuracy']:+.3f} over the majority"
        for row in result["tenants"]
        if row["accuracy"] < row["majority_accuracy"] + 0.20
    ]
    swap = result["swap"]
    if swap["failed"] or swap["mixed"] or not swap["answered_by_new"]:
        problems.append(
            f"hot swap: {swap['failed']} failed, {swap['mixed']} mixed, {swap['answered_by_new']} by the new"
        )
    return problems


def _show(result: dict[str, Any], log: Log) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("adapter", no_wrap=True)
    for head in ("rows", "steps", "trained", "test rows", "backbone", "majority", "adapter's"):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("version", no_wrap=True)
    for row in result["tenants"]:
        grid.add_row(
            f"{row['tenant']}.{row['adapter']}",
            *(f"{row[key]:,}" for key in ("rows", "steps", "trainable_parameters", "test_rows")),
            *(f"{row[key]:.3f}" for key in ("backbone_accuracy", "majority_accuracy", "accuracy")),
            f"v{row['version']} {' '.join(row['aliases'])}",
        )
    console = Console(width=110, highlight=False)
    with console.capture() as drawn:
        console.print(grid)
    log(drawn.get())
    swap = result["swap"]
    counts = "{requests} requests, {failed} failed, {mixed} mixed"
    answered = "{answered_by_old} by the old, {answered_by_new} by the new"
    log(
        "hot swap of {model}: v{old_version} → v{new_version} with {in_flight} requests in flight".format(**swap)
        + f"; {counts.format(**swap)}; {answered.format(**swap)}, first after {swap['seconds_to_first_new']} s; "
        + "accuracy {old_accuracy:.3f} → {new_accuracy:.3f}".format(**swap)
    )
    log(f"the whole demo took {result['seconds']:.0f} s")


def _farewell(served: Served, secret: str, row: Example, keep: bool, log: Log) -> None:
    body = json.dumps({"model": _name(DEMO_TENANTS[0]), "messages": list(row.messages), "max_tokens": 8})
    url, key = (served.url, secret) if keep else ("http://127.0.0.1:8000", "$KEY")
    command = (
        f'curl {url}/v1/chat/completions -H "Authorization: Bearer {key}" '
        f"-H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
    if keep:
        log(f"\nit runs on; `pedro down` ends it. Try:\n  {command}")
    else:
        log(
            "\nended. `make dashboard` shows the adapters, `make serve` serves them again; then, with "
            f"KEY=$(.venv/bin/pedro keys create {DEMO_TENANTS[0].name}):\n  {command}"
        )


def _rows(path: Path) -> list[Example]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [example for number, line in enumerate(lines, 1) for example in parse_line(line, number)]


def _name(tenant: DemoTenant) -> str:
    return ModelRef(tenant.name, tenant.adapter).name


def _save(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(value, indent=2))
    scratch.rename(path)
