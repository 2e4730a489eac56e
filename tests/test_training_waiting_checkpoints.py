"""Checkpoints of a job that its driver had not published yet are published by the next one, once each."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from errand_workers import Worker, ended, started
from ray.train import Checkpoint
from retention_home import open_home
from serving_adapters import stub_adapter

from pedro.errors import UnavailableError
from pedro.store import checkpoint_gate, checkpoint_of
from pedro.training.outbox import MODEL
from pedro.training.waiting_checkpoints import MADE, WAITING, keep, waiting


@pytest.fixture
def home(tmp_path):
    settings, registry = open_home(tmp_path / "home")
    yield settings, registry
    registry.store.close()


def made_at(step):
    return {"step": step, "best_step": step, "metrics": {"step": step, "valid_loss": 1.0}}


def published(registry, job):
    """The steps of which there are versions, and those that the job tells of."""
    versions = registry.versions("acme.colours")
    events = registry.store.list_job_events(job, ("checkpoint",), limit=10)
    return sorted(checkpoint_of(one.gate).step for one in versions), sorted(one.data["step"] for one in events)


def test_what_waited_in_a_driver_that_was_killed_becomes_versions_once_when_the_next_one_starts(
    home, tmp_path, monkeypatch
):
    settings, registry = home
    job = registry.store.create_job("acme", "colours", {}).id
    run = registry.start_run(experiment="acme.colours", name=job, params={}, tags={})
    over = Event()
    with monkeypatch.context() as patched:
        patched.setattr("pedro.training.errands.publish", lambda *_: over.wait(300))  # the tracking server is slow
        killed = started(settings, Worker(), run, job)
        for step in (5, 10):
            kept = tmp_path / f"checkpoint_{step}"
            stub_adapter(kept / "adapter", f"at_{step}", "sha256:bb")
            report = SimpleNamespace(checkpoint=Checkpoint.from_directory(kept))
            killed.after_report(report, [{MODEL: made_at(step)}])
            shutil.rmtree(kept)  # newer ones have come
    assert published(registry, job) == ([], [])
    for _ in range(2):
        ended(started(settings, Worker(), run, job))
        assert published(registry, job) == ([5, 10], [5, 10])
    assert not list((Path(settings.storage) / "runs" / job / WAITING).iterdir())
    over.set()
    killed.close()
    assert published(registry, job) == ([5, 10], [5, 10])


def test_a_checkpoint_that_could_not_be_published_is_at_the_drivers_end_or_by_the_next(home, tmp_path, monkeypatch):
    settings, registry = home
    job = registry.store.create_job("acme", "colours", {}).id
    run = registry.start_run(experiment="acme.colours", name=job, params={}, tags={})
    stub_adapter(tmp_path / "adapter", "one", "sha256:bb")
    kept = keep(
        f"{settings.storage}/runs/{job}", partial(shutil.copytree, tmp_path / "adapter", dirs_exist_ok=True), made_at(7)
    )

    def away(*_):
        tries.append(1)
        raise UnavailableError("the registry does not answer")

    tries = []
    with monkeypatch.context() as patched:
        patched.setattr("pedro.training.errands.publish", away)
        ended(started(settings, Worker(), run, job))
    assert len(tries) == 2, "at its end once more"
    assert waiting(f"{settings.storage}/runs/{job}") == [kept]
    ended(started(settings, Worker(), run, job))
    assert published(registry, job) == ([7], [7])
    assert waiting(f"{settings.storage}/runs/{job}") == []


def test_a_checkpoint_that_was_kept_as_the_driver_was_killed_is_published_by_the_next(home, tmp_path, capsys):
    """Between the report to Ray Train and the copy that waits; one that is not whole is none."""
    settings, registry = home
    job = registry.store.create_job("acme", "colours", {}).id
    run = registry.start_run(experiment="acme.colours", name=job, params={}, tags={})
    for step, file in ((3, None), (6, "adapter_config.json")):
        kept = Path(settings.storage) / "runs" / job / f"checkpoint_{step}"
        stub_adapter(kept / "adapter", f"at_{step}", "sha256:bb")
        (kept / MADE).write_text(json.dumps(made_at(step)))
        if file:
            (kept / "adapter" / file).unlink()
    (kept.parent / "checkpoint_9").mkdir()
    (kept.parent / "checkpoint_9" / MADE).write_text('{"step"')
    ended(started(settings, Worker(), run, job))
    assert published(registry, job) == ([3], [3])
    assert "the checkpoint of step 6 was not saved as a model" in capsys.readouterr().out
    assert (kept.parent / "checkpoint_3" / "adapter").is_dir(), "the run goes on from it"
    registry.retire("acme.colours", 1, actor="key:acme/key_1")
    ended(started(settings, Worker(), run, job))
    assert published(registry, job)[0] == [], "what its tenant deleted does not come back"


def test_a_driver_that_was_killed_before_it_told_of_a_version_is_followed_by_one_that_tells(home, tmp_path):
    settings, registry = home
    job = registry.store.create_job("acme", "colours", {}).id
    run = registry.start_run(experiment="acme.colours", name=job, params={}, tags={})
    kept = Path(settings.storage) / "runs" / job / "checkpoint_3"
    adapter = stub_adapter(kept / "adapter", "at_3", "sha256:bb")
    (kept / MADE).write_text(json.dumps(made_at(3)))
    own = registry.start_run(experiment="acme.colours", name="step", params={}, tags={})
    registry.register(own, adapter, "acme", "colours", gate=checkpoint_gate(job, 3))
    assert published(registry, job) == ([3], [])
    ended(started(settings, Worker(), run, job))
    assert published(registry, job) == ([3], [3])


def test_checkpoints_wait_behind_a_url_too(tmp_path):
    run = f"file://{tmp_path}/bucket/runs/ftjob-1"
    assert waiting(run) == []
    stub_adapter(tmp_path / "adapter", "one", "sha256:bb")
    kept = keep(run, partial(shutil.copytree, tmp_path / "adapter", dirs_exist_ok=True), made_at(7))
    assert waiting(run) == [kept]
    with kept.here() as directory:
        assert sorted(path.name for path in directory.iterdir()) == sorted(
            path.name for path in (tmp_path / "adapter").iterdir()
        )
    kept.remove()
    kept.remove()
    assert waiting(run) == []
