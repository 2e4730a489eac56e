"""The demo: three tenants' files become three adapters on one backbone, served and hot-swapped. The story only.

Everything goes the way a user's own would: spec → Ray job → MLflow registry → Ray Serve → HTTP with API keys.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro import cluster
from pedro.backbone import quiet, resolve_backbone
from pedro.backbones.pull import pull
from pedro.demo.questions import Questions
from pedro.demo.report import farewell, problems, show, swap_report
from pedro.demo.stories import FULL, SMALL, Story, StoryPart, demo_spec
from pedro.demo.tenant_client import answers, promote, swap_under_load
from pedro.errors import BackboneError, ConflictError, PedroError, UnavailableError
from pedro.provenance import provenance
from pedro.registry import Registry, Version
from pedro.serving.config import ServeConfig
from pedro.serving.deploy import Served, deploy, end, find
from pedro.store import Store
from pedro.training.queue.process import end_controller
from pedro.training.submit import submit, wait

if TYPE_CHECKING:
    from pedro.config import Settings

Log = Callable[[str], None]
Outcome = Future[None]
SHOWN = 3  # rows of each tenant whose answers the result holds as text


def run_demo(settings: Settings, *, small: bool, keep: bool, port: int, log: Log) -> dict[str, Any]:
    """Run the story and return what `demo/result.json` of the home holds too. Adapters of an earlier run are reused."""
    began, code = time.monotonic(), provenance()
    story = choose_story(settings.home, small, log)
    started = time.monotonic()
    digest = resolve_backbone(story.backbone).digest
    registry, store = Registry.open(settings), Store(settings.database_url)
    served = _server_of(story, settings)
    cluster.connect(settings, log)
    jobs = _train_missing(story, digest, settings, registry, store, log)
    keys, secrets = _keys(story, store)
    try:
        config = ServeConfig(backbone=story.backbone, threads=story.threads)
        served = served or deploy(settings, config, port=port, log=log)
        for outcome in jobs:
            outcome.result()
        trained = time.monotonic() - started
        made = {part.name: _versions(registry, part, digest)[: len(part.steps)] for part in story.parts}
        swap = _swap(story.swapped, made, served, secrets, log)
        log("\nasking held-out rows over HTTP: the bare backbone, then the adapter")
        parts = sorted(story.parts, key=lambda part: part.name)
        tenants = [_measure(part, registry.get(part.name), served, secrets[part.tenant.name], log) for part in parts]
        own = next(row for row in tenants if row["tenant"] == story.swapped.tenant.name)
        result = {
            **code,
            "seconds": round(time.monotonic() - started, 1),
            "pull_seconds": round(started - began, 1),
            "training_seconds": round(trained, 1),
            "backbone": story.backbone,
            "backbone_digest": digest,
            "tenants": tenants,
            "swap": {**swap, "new_accuracy": own["score"]},
        }
        _save(settings.home / "demo" / "result.json", result)
        show(result, log)
        farewell(story.swapped, served, secrets[story.swapped.tenant.name], keep, log)
    finally:
        if not keep:
            for key in keys:
                store.revoke_key(key)
            end_controller(settings)
            end(settings)
    if found := problems(result, story.margin):
        raise PedroError("the demo did not reach its marks: " + "; ".join(found))
    return result


def choose_story(home: Path, small: bool, log: Log) -> Story:
    """The full story once its backbone is here; the small one if that is wanted, or the backbone cannot be had."""
    if small:
        return SMALL
    quiet()
    try:
        pull(home, FULL.backbone, log)
    except (BackboneError, UnavailableError) as error:
        log(f"{FULL.backbone} cannot be had, so the demo runs on {SMALL.backbone}: {' '.join(error.message.split())}")
        return SMALL
    return FULL


def _server_of(story: Story, settings: Settings) -> Served | None:
    """The server that runs already. Raises ConflictError if it serves another backbone."""
    served = find(settings)
    if served is not None and served.backbone != story.backbone:
        raise ConflictError(
            f"backbone: a server of {served.backbone} runs at {served.url}, and the demo wants {story.backbone}; end "
            "it with `pedro down`",
            param="backbone",
        )
    return served


def _train_missing(
    story: Story, digest: str, settings: Settings, registry: Registry, store: Store, log: Log
) -> list[Outcome]:
    """Start the trainings whose versions are not there: as many at once as there are cores, a tenant's in turn."""

    def train(part: StoryPart, have: int) -> None:
        for steps in part.steps[have:]:
            job = submit(demo_spec(story, part, steps), settings, store)
            log(f"{part.name}: {part.tenant.title}; job {job} trains {steps} steps")
            wait(job, settings, store, lambda line: log(f"  {part.name:<16} {line}"))

    outcomes = []
    threads = ThreadPoolExecutor(max_workers=min(len(story.parts), os.cpu_count() or 1), thread_name_prefix="demo")
    for part in story.parts:
        have = _versions(registry, part, digest)
        if have:
            log(f"{part.name}: there already: {', '.join(version.ref for version in have)}")
        outcomes.append(threads.submit(train, part, len(have)))
    threads.shutdown(wait=False)
    return outcomes


def _versions(registry: Registry, part: StoryPart, digest: str) -> list[Version]:
    """The versions of a part's adapter that were made for this backbone, oldest first."""
    return [version for version in registry.versions(part.name) if version.backbone_digest == digest]


def _keys(story: Story, store: Store) -> tuple[list[str], dict[str, str]]:
    """One key a tenant and one for the operator ("*"): their ids, and their secrets by tenant."""
    ids, secrets = [], {}
    for part in story.parts:
        record, secrets[part.tenant.name] = store.create_key(part.tenant.name, ["infer"], "demo")
        ids.append(record.id)
    record, secrets["*"] = store.create_key("operator", ["admin"], "demo")
    return [*ids, record.id], secrets


def _swap(
    part: StoryPart,
    made: dict[str, list[Version]],
    served: Served,
    secrets: dict[str, str],
    log: Log,
) -> dict[str, Any]:
    """The champions as the story wants them; then the old version of `part` gives way to the new one under load."""
    old, new = made[part.name]
    for versions in made.values():
        promote(served.url, secrets["*"], versions[0].name, versions[0].version)
    questions, secret = Questions(part.tenant, part.rows), secrets[part.tenant.name]
    log(f"\nhot swap: {old.ref} → {new.ref} while requests run")
    before = questions.score(answers(served.url, secret, old.name, questions.to_adapter()))
    seen = swap_under_load(served.url, secret, secrets["*"], old.name, new.version, questions.to_adapter())
    return {**swap_report(old, new, seen), "old_accuracy": before}


def _measure(part: StoryPart, version: Version, served: Served, secret: str, log: Log) -> dict[str, Any]:
    """The same rows by the bare backbone, told what is asked, with and without examples, and by the adapter."""
    questions = Questions(part.tenant, part.rows)
    log(f"  {version.ref}: {len(questions.asked)} rows")
    ask = partial(answers, served.url, secret)
    said = {"zero_shot": ask(served.backbone, questions.to_backbone())}
    if part.shots:
        said["few_shot"] = ask(served.backbone, questions.with_examples(part.shots))
    said["adapter"] = ask(version.name, questions.to_adapter())
    return {
        "tenant": part.tenant.name,
        "adapter": part.tenant.adapter,
        "title": part.tenant.title,
        "metric": questions.metric,
        "rows": version.metrics.get("train_rows"),
        "steps": version.metrics.get("steps"),
        "batch_size": part.training["batch_size"],
        "seconds": version.metrics.get("seconds"),
        "trainable_parameters": version.trainable_parameters,
        "test_rows": len(questions.asked),
        "majority": questions.majority(),
        "zero_shot": questions.score(said["zero_shot"]),
        "shots": part.shots,
        "few_shot": questions.score(said["few_shot"]) if part.shots else None,
        "score": questions.score(said["adapter"]),
        "answers": [
            {
                "asked": question.messages[-1]["content"],
                "wanted": question.row.completion,
                **{way: texts[place] for way, texts in said.items()},
            }
            for place, question in enumerate(questions.asked[:SHOWN])
        ],
        "version": version.version,
        "digest": version.digest,
        "aliases": list(version.aliases),
        "run_id": version.run_id,
    }


def _save(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(value, indent=2) + "\n")
    scratch.rename(path)
