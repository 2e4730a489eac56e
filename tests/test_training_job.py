"""Whole jobs on a real Ray cluster of their own: killed workers, hopeless losses, bad data, two at once."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
from serving_adapters import register
from training_groups import Training, train_in_group
from training_runs import LocalReporter, context_for, spec_for

from pedro import cluster
from pedro.config import Settings
from pedro.errors import ConfigError, NotFoundError, TrainingError
from pedro.registry import Registry
from pedro.store import JobStatus, Store
from pedro.training import ray_jobs, worker
from pedro.training import submit as jobs
from pedro.training.job_log import kept_log
from pedro.training.queue.launcher import check_fits
from pedro.training.queue.process import end_controller

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
    end_controller(settings)
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What so many workers train that nobody disturbs; each group is started once."""

    @cache
    def whole(workers):
        folder = tmp_path_factory.mktemp("whole")
        return train_in_group(workers, folder, [Training("whole", _long_spec(folder, workers).to_dict())])["whole"]

    return whole


def _long_spec(folder, workers=1):
    return spec_for(folder, resources={"workers": workers, "zero_stage": workers - 1}, **LONG)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_resumes_and_ends_with_the_same_adapter(home, whole, tmp_path, workers):
    settings, registry, store, _ = home
    spec, whole = _long_spec(tmp_path, workers), whole(workers)
    job = jobs.submit(_named(spec, f"killed{workers}"), settings, store)
    lines, results = [], []
    follower = threading.Thread(target=lambda: results.append(jobs.wait(job, settings, store, lines.append)))
    follower.start()
    _wait_for_checkpoints(settings, job)
    _workers(settings)[0].send_signal(signal.SIGKILL)
    follower.join()
    killed = results[0]
    assert any(line.startswith("resumed at step") for line in lines), lines
    lost = [line for line in lines if re.match(r"worker \d was lost|worker processes 0, 1 were lost", line)]
    assert len(lost) == 1, lines  # the process that was killed may be either's, and its peer may fail of it
    assert "1 of at most 3 times" in lost[0]
    _wait_for_log(settings, job, lines)
    assert (killed.digest, killed.metrics["accuracy"]) == (whole["digest"], whole["metrics"]["accuracy"])
    assert (killed.steps, killed.optimizer_steps) == (40, 80)
    version = registry.get(f"acme.killed{workers}")
    assert (version.digest, version.aliases) == (killed.digest, ("champion",))
    assert (store.get_job(job).status, store.get_job(job).result) == ("succeeded", killed.to_dict())
    assert [step for step, _ in registry.metric_history(version.run_id, "dev/loss")][-1] == 40
    used = {used.model: used for used in store.usage("acme", by=["model"])}[f"acme.killed{workers}"]
    assert used.training_tokens == whole["tokens"], "what was done again after the kill counts once"
    assert used.training_seconds > 0


def test_a_hopeless_loss_ends_the_job_at_once_and_registers_nothing(home, tmp_path):
    settings, registry, store, url = home
    spec = _named(spec_for(tmp_path, lr=100, clip=0, warmup=0.0, max_steps=40), "hopeless")
    job = jobs.submit(spec, settings, store)
    with pytest.raises(TrainingError, match=r"the loss is .*lower training.lr"):
        jobs.wait(job, settings, store)
    assert ray_jobs.logs(job, url).count("training 21,320 parameters") == 1
    with pytest.raises(NotFoundError):
        registry.get("acme.hopeless")
    assert store.get_job(job).status == "failed"
    assert "lower training.lr" in store.get_job(job).message


def test_a_bad_line_stops_a_job_before_any_worker_starts(home, tmp_path):
    settings, _, store, url = home
    spec = _named(spec_for(tmp_path), "badline")
    with Path(spec.data.train).open("a") as stream:
        stream.write('{"prompt": "no answer"}\n')
    job = jobs.submit(spec, settings, store)
    with pytest.raises(TrainingError, match=r"data.train: line 73"):
        jobs.wait(job, settings, store)
    assert "line 73" in store.get_job(job).message
    assert "RayTrainWorker" not in ray_jobs.logs(job, url)


def test_two_jobs_run_side_by_side_and_the_second_version_meets_the_champion(home, tmp_path):
    settings, registry, store, _ = home
    context = context_for(spec_for(tmp_path), tmp_path)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))
    worker.save(context, trained, tmp_path / "adapter", {})
    register(registry, tmp_path / "adapter", "acme.pair")
    floor = spec_for(tmp_path).gate.model_copy(update={"floor": 1.01})
    refused = _named(spec_for(tmp_path, seed=1), "pair").model_copy(update={"gate": floor})
    other = _named(spec_for(tmp_path, "lora"), "other")
    started = [jobs.submit(spec, settings, store) for spec in (refused, other)]
    most = 0
    while not all(store.get_job(job).status.final for job in started):
        most = max(most, len(_workers(settings)))
        for name in ("DatasetManager", "PlacementGroupCleaner", "ray.util.client.server", "autoscaler"):
            assert not _actors(settings, name), "what no job has a use for"
        time.sleep(0.2)
    assert most >= 2
    second, lora = (jobs.wait(job, settings, store) for job in started)
    assert (second.model, second.alias) == ("acme.pair:2", "candidate")
    assert "below the gate's floor of 1.01" in second.gate
    assert registry.get("acme.pair").version == 1
    assert registry.get("acme.pair", "candidate").gate.startswith("refused: ")
    assert (lora.model, lora.alias) == ("acme.other:1", "champion")
    assert lora.trainable_parameters == 46_240
    assert json.loads(json.dumps(lora.to_dict())) == lora.to_dict()


def test_queued_jobs_outlive_controller_and_cluster_and_end_once_with_the_same_adapters(home, whole, tmp_path):
    settings, registry, store, _ = home
    spec, whole = _long_spec(tmp_path), whole(1)
    names = ["first", "second", "third"]
    started = [jobs.submit(_named(spec, name), settings, store) for name in names]
    _wait_for_checkpoints(settings, started[0])
    assert jobs.stop(started[2], settings, store, JobStatus.PAUSED).status == "paused"
    controller = int((settings.home / "ray" / "controller.pid").read_text())
    head = psutil.Process(cluster.find_head(settings).pid)
    everything = [psutil.Process(controller), head, *head.children(recursive=True)]
    for process in everything:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everything, timeout=60)
    assert jobs.resume(started[2], settings, store).status == "queued"  # starts another controller, and that a head
    results = [jobs.wait(job, settings, store) for job in started]
    assert {result.digest for result in results} == {whole["digest"]}
    assert [registry.versions(f"acme.{name}")[0].ref for name in names] == [result.model for result in results]
    assert all(len(registry.versions(f"acme.{name}")) == 1 for name in names)
    assert store.get_job(started[0]).attempt == 2
    assert "resumed at step" in kept_log(settings.storage, started[0])


def _wait_for_log(settings, job, lines):
    """Until what is kept has these lines and the result, which is copied after the job's end."""
    deadline = time.monotonic() + 60
    while (kept := list(jobs.readable(kept_log(settings.storage, job).splitlines())))[:-1] != lines:
        assert time.monotonic() < deadline, f"{kept} beside {lines}"
        time.sleep(0.05)


def _wait_for_checkpoints(settings, job):
    """Until there is a second one: then the first is safe."""
    kept = Path(settings.storage) / "runs" / job
    deadline = time.monotonic() + 300
    while len(list(kept.glob("checkpoint_*"))) < 2:
        assert time.monotonic() < deadline, kept_log(settings.storage, job)
        time.sleep(0.05)


def test_ending_the_cluster_names_the_jobs_that_run_and_wants_a_yes(home, tmp_path):
    settings, _, store, _ = home
    url = cluster.connect(settings).dashboard_url
    job = jobs.submit(_named(spec_for(tmp_path, max_steps=100_000), "ended"), settings, store)
    while store.get_job(job).status != "running":
        time.sleep(0.2)
    env = {**os.environ, **settings.env()}
    with pytest.raises(ConfigError, match=r"needs 4096 CPU, and this machine has \d+ CPU; lower"):
        check_fits(spec_for(tmp_path, resources={"cpus_per_worker": 4096}), settings)
    words = [sys.executable, "-m", "pedro.cli", "down"]
    refused = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert f"acme.ended ({job})" in refused.stderr
    assert "give --yes" in refused.stderr
    assert ray_jobs.status(job, url) == "RUNNING"
    ended = subprocess.run([*words, "--yes"], env=env, capture_output=True, text=True, check=False)
    assert ended.stdout == "ended head\n", ended.stderr
    assert "Draining" not in (settings.home / "ray" / "head.log").read_text(), "its head waits for what it ran"
    assert store.get_job(job).status == "cancelled"
    assert "examples" in kept_log(settings.storage, job)
