"""Whole jobs on a real Ray cluster of their own: killed workers, hopeless losses, bad data, two at once."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from serving_adapters import register
from training_groups import Training, train_in_group
from training_runs import LocalReporter, context_for, spec_for

from pedro import cluster
from pedro.config import Settings
from pedro.errors import NotFoundError, TrainingError
from pedro.registry import Registry
from pedro.store import Store
from pedro.training import submit as jobs
from pedro.training import worker
from pedro.training.job_log import kept_log

pytestmark = pytest.mark.slow
LONG = {"max_steps": 40, "eval_every": 10, "checkpoint_every": 5}  # so that there is time for a kill


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Settings, registry, store and dashboard URL of one local cluster."""
    folder = tmp_path_factory.mktemp("home")
    inherited = dict(os.environ)
    settings = Settings.from_env({"PEDRO_HOME": str(folder)})
    head = cluster.connect(settings)
    registry = Registry.open(settings)
    registry.models()  # creates the schema, which takes a while
    yield settings, registry, Store(settings.database_url), head.dashboard_url
    cluster.stop_head(settings)
    os.environ.clear()
    os.environ.update(inherited)


def _named(spec, adapter):
    return spec.model_copy(update={"adapter": adapter})


def _workers(settings):
    return _actors(settings, "RayTrainWorker")


def _actors(settings, name):
    head = psutil.Process(cluster.find_head(settings).pid)
    return [p for p in head.children(recursive=True) if name in _title(p)]


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone meanwhile
        return ""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_resumes_and_ends_with_the_same_adapter(home, tmp_path, workers):
    settings, registry, store, url = home
    spec = spec_for(tmp_path, resources={"workers": workers, "zero_stage": workers - 1}, **LONG)
    whole = train_in_group(workers, tmp_path, [Training("whole", spec.to_dict())])["whole"]
    job = jobs.submit(_named(spec, f"killed{workers}"), settings, url, store)
    lines, results = [], []
    follower = threading.Thread(target=lambda: results.append(jobs.wait(job, url, lines.append, store)))
    follower.start()
    kept = Path(settings.storage) / "runs" / job
    while len(list(kept.glob("checkpoint_*"))) < 2:  # once there is a second one, the first is safe
        assert follower.is_alive(), lines
        time.sleep(0.05)
    _workers(settings)[0].send_signal(signal.SIGKILL)
    follower.join()
    killed = results[0]
    assert any(line.startswith("resumed at step") for line in lines), lines
    lost = [line for line in lines if re.match(r"worker \d was lost|worker processes 0, 1 were lost", line)]
    assert len(lost) == 1, lines  # the process that was killed may be either's, and its peer may fail of it
    assert "1 of at most 3 times" in lost[0]
    assert list(jobs.readable(kept_log(settings.storage, job).splitlines()))[:-1] == lines
    assert (killed.digest, killed.metrics["accuracy"]) == (whole["digest"], whole["metrics"]["accuracy"])
    assert (killed.steps, killed.optimizer_steps) == (40, 80)
    version = registry.get(f"acme.killed{workers}")
    assert (version.digest, version.aliases) == (killed.digest, ("champion",))
    assert (store.get_job(job).status, store.get_job(job).result) == ("succeeded", killed.to_dict())
    assert [step for step, _ in registry.metric_history(version.run_id, "dev/loss")][-1] == 40


def test_a_hopeless_loss_ends_the_job_at_once_and_registers_nothing(home, tmp_path):
    settings, registry, store, url = home
    spec = _named(spec_for(tmp_path, lr=100, clip=0, warmup=0.0, max_steps=40), "hopeless")
    job = jobs.submit(spec, settings, url, store)
    with pytest.raises(TrainingError, match=r"the loss is .*lower training.lr"):
        jobs.wait(job, url)
    assert jobs.logs(job, url).count("training 21,320 parameters") == 1
    with pytest.raises(NotFoundError):
        registry.get("acme.hopeless")
    assert store.get_job(job).status == "failed"
    assert "lower training.lr" in store.get_job(job).message


def test_a_bad_line_stops_a_job_before_any_worker_starts(home, tmp_path):
    settings, _, store, url = home
    spec = _named(spec_for(tmp_path), "badline")
    with Path(spec.data.train).open("a") as stream:
        stream.write('{"prompt": "no answer"}\n')
    job = jobs.submit(spec, settings, url, store)
    with pytest.raises(TrainingError, match=r"data.train: line 73"):
        jobs.wait(job, url)
    assert "line 73" in store.get_job(job).message
    assert "RayTrainWorker" not in jobs.logs(job, url)


def test_two_jobs_run_side_by_side_and_the_second_version_meets_the_champion(home, tmp_path):
    settings, registry, store, url = home
    context = context_for(spec_for(tmp_path), tmp_path)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))
    worker.save(context, trained, tmp_path / "adapter", {})
    register(registry, tmp_path / "adapter", "acme.pair")
    floor = spec_for(tmp_path).gate.model_copy(update={"floor": 1.01})
    refused = _named(spec_for(tmp_path, seed=1), "pair").model_copy(update={"gate": floor})
    other = _named(spec_for(tmp_path, "lora"), "other")
    started = [jobs.submit(spec, settings, url, store) for spec in (refused, other)]
    most = 0
    while any(jobs.status(job, url) in ("PENDING", "RUNNING") for job in started):
        most = max(most, len(_workers(settings)))
        assert not _actors(settings, "DatasetManager") + _actors(settings, "PlacementGroupCleaner")
        time.sleep(0.2)
    assert most >= 2
    second, lora = (jobs.wait(job, url, store=store) for job in started)
    assert (second.model, second.alias) == ("acme.pair:2", "candidate")
    assert "below the gate's floor of 1.01" in second.gate
    assert registry.get("acme.pair").version == 1
    assert registry.get("acme.pair", "candidate").gate.startswith("refused: ")
    assert (lora.model, lora.alias) == ("acme.other:1", "champion")
    assert lora.trainable_parameters == 46_240
    assert json.loads(json.dumps(lora.to_dict())) == lora.to_dict()


def test_ending_the_cluster_names_the_jobs_that_run_and_wants_a_yes(home, tmp_path):
    settings, _, store, url = home
    job = jobs.submit(_named(spec_for(tmp_path, max_steps=100_000), "ended"), settings, url, store)
    while store.get_job(job).status != "running":
        time.sleep(0.2)
    words = [sys.executable, "-m", "pedro.cli", "down"]
    env = {**os.environ, **settings.env()}
    refused = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert f"acme.ended ({job})" in refused.stderr
    assert "give --yes" in refused.stderr
    assert jobs.status(job, url) == "RUNNING"
    ended = subprocess.run([*words, "--yes"], env=env, capture_output=True, text=True, check=False)
    assert ended.stdout == "ended head\n", ended.stderr
    assert store.get_job(job).status == "cancelled"
    assert "examples" in kept_log(settings.storage, job)
