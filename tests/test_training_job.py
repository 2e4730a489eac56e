"""Whole jobs and a sweep on a real Ray cluster of their own: killed workers, hopeless losses, bad data, two at once.

One job is watched and ended on the dashboard's Runs page.
"""

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
from dashboard_app import DASHBOARD, healthy, opener, words
from serving_adapters import register
from training_groups import Training, train_in_group
from training_runs import LocalReporter, context_for, spec_for, sweep_for

from pedro import cluster
from pedro.config import NOT_FOR_WORKERS, Settings
from pedro.errors import ConfigError, NotFoundError, TrainingError
from pedro.registry import MANIFEST, Registry
from pedro.store import JobStatus, Store
from pedro.training import ray_jobs, worker
from pedro.training import submit as jobs
from pedro.training.job_log import kept_log
from pedro.training.queue.launcher import check_fits
from pedro.training.queue.process import end_controller
from pedro.training.sweep import launch
from pedro.training.sweep.records import Records, TrialState

pytestmark = pytest.mark.slow
PATIENCE_S = 1200
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
    return [process for process, title in _titles(settings) if name in title]


def _titles(settings):
    """The processes of the head, each with its command line."""
    head = psutil.Process(cluster.find_head(settings).pid)
    return [(process, _title(process)) for process in head.children(recursive=True)]


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
        training = Training("whole", _long_spec(folder, workers).to_dict(), as_job=True)
        return train_in_group(workers, folder, [training])["whole"]

    return whole


def _long_spec(folder, workers=1):
    return spec_for(folder, resources={"workers": workers, "zero_stage": workers - 1}, **LONG)


def test_a_training_job_is_watched_and_ended_from_the_dashboards_page(home, tmp_path, monkeypatch):
    settings, _, store, url = home
    endless = {"max_steps": 10**6, "eval_every": 20, "patience": 10**6}
    job_id = jobs.submit(spec_for(tmp_path, **endless), settings, store)
    monkeypatch.syspath_prepend(str(DASHBOARD))
    from sources.jobs import curve_names, curve_rows, job_runs, live_jobs, log_tail

    deadline = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline, "the job drew no curve in time"
        (job,) = live_jobs(settings).jobs
        drawn, problem = job_runs(settings, job)
        if job.status == "running" and curve_rows(settings, curve_names(drawn)):
            break
        assert job.live, job
        assert not problem
        time.sleep(1)
    assert any("step" in line for line in log_tail(settings, job_id)[0])

    shown = opener(monkeypatch, "runs")(settings.home)
    assert len(shown.get("vega_lite_chart")) == 1
    assert "running" in words(shown.markdown)
    assert shown.code
    _press(shown, "End this job …")
    _press(shown, "End it")
    assert f"{job_id} was ended" in words(shown.toast)
    assert store.get_job(job_id).status == "cancelled"
    while {job["id"]: job["status"] for job in ray_jobs.jobs(url)}[job_id] == "RUNNING":
        assert time.monotonic() < deadline, "the cluster did not end the job"
        time.sleep(0.5)
    while "Nothing is running" not in words(healthy(shown.run()).caption):
        assert time.monotonic() < deadline, "the page did not notice"
        time.sleep(1)


def _press(shown, label) -> None:
    healthy(next(button for button in shown.button if button.label == label).click().run())


def test_a_killed_worker_of_two_resumes_and_ends_with_the_same_adapter(home, whole, tmp_path):
    settings, registry, store, _ = home
    spec, whole = _long_spec(tmp_path, workers=2), whole(2)
    job = jobs.submit(_named(spec, "killed"), settings, store)
    lines, results = [], []
    follower = threading.Thread(target=lambda: results.append(jobs.wait(job, settings, store, lines.append)))
    follower.start()
    _wait_for_checkpoints(settings, job)
    victim = _workers(settings)[0]
    given = victim.environ()
    assert not {name for name in NOT_FOR_WORKERS if given.get(name)}, "it opens neither MLflow nor the database"
    assert given["PEDRO_HOME"] == str(settings.home)
    victim.send_signal(signal.SIGKILL)
    follower.join()
    killed = results[0]
    assert any(line.startswith("resumed at step") for line in lines), lines
    lost = [line for line in lines if re.match(r"worker \d was lost|worker processes 0, 1 were lost", line)]
    assert len(lost) == 1, lines  # the process that was killed may be either's, and its peer may fail of it
    assert "1 of at most 3 times" in lost[0]
    _wait_for_log(settings, job, lines)
    assert (killed.digest, killed.metrics["accuracy"]) == (whole["digest"], whole["metrics"]["accuracy"])
    assert (killed.steps, killed.optimizer_steps) == (40, 80)
    version = registry.get("acme.killed")
    assert (version.digest, version.aliases) == (killed.digest, ("champion",))
    assert (store.get_job(job).status, store.get_job(job).result) == ("succeeded", killed.to_dict())
    assert [step for step, _ in registry.metric_history(version.run_id, "dev/loss")][-1] == 40
    used = {used.model: used for used in store.usage("acme", by=["model"])}["acme.killed"]
    assert used.training_tokens == whole["tokens"], "what was done again after the kill counts once"
    assert used.training_seconds > 0


def test_a_hopeless_loss_and_a_bad_line_end_their_jobs_at_once_and_register_nothing(home, tmp_path):
    settings, registry, store, url = home
    spec = _named(spec_for(tmp_path, lr=100, clip=0, warmup=0.0, max_steps=40), "hopeless")
    hopeless = jobs.submit(spec, settings, store)
    (tmp_path / "bad").mkdir()
    spec = _named(spec_for(tmp_path / "bad"), "badline")
    with Path(spec.data.train).open("a") as stream:
        stream.write('{"prompt": "no answer"}\n')
    bad = jobs.submit(spec, settings, store)
    for job, adapter, told, wanted in (
        (hopeless, "hopeless", "the loss is .*lower training.lr", 1),
        (bad, "badline", "data.train: line 73", 0),
    ):
        with pytest.raises(TrainingError, match=told):
            jobs.wait(job, settings, store)
        assert ray_jobs.logs(job, url).count("training 21,320 parameters") == wanted, "no more than one start"
        with pytest.raises(NotFoundError):
            registry.get(f"acme.{adapter}")
        assert store.get_job(job).status == "failed"
        assert re.search(told, store.get_job(job).message)
    assert "RayTrainWorker" not in ray_jobs.logs(bad, url), "found before any worker starts"


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
        titles = [title for _, title in _titles(settings)]
        most = max(most, sum("RayTrainWorker" in title for title in titles))
        for name in ("DatasetManager", "PlacementGroupCleaner", "TrainController", "client.server", "autoscaler"):
            assert not any(name in title for title in titles), "what no job has a use for"
        time.sleep(0.5)
    assert most >= 2
    second, lora = (jobs.wait(job, settings, store) for job in started)
    assert (second.model, second.alias) == ("acme.pair:2", "candidate")
    assert "below the gate's floor of 1.01" in second.gate
    assert registry.get("acme.pair").version == 1
    assert registry.get("acme.pair", "candidate").gate.startswith("refused: ")
    assert (lora.model, lora.alias) == ("acme.other:1", "champion")
    assert lora.trainable_parameters == 46_240
    assert json.loads(json.dumps(lora.to_dict())) == lora.to_dict()


def test_a_sweep_that_is_killed_and_paused_repeats_no_finished_trial_and_a_diverging_one_fails_alone(home, tmp_path):
    settings, registry, store, url = home
    rates = [1e-2, 3e-3, 100.0]  # two at a time: the last begins when one of the others has finished
    training = {"max_steps": 20, "eval_every": 10, "clip": 0, "warmup": 0.0}
    asked = {"scheduler": {"name": "none"}, "concurrency": 2, "training": training}
    spec = sweep_for(tmp_path, {"training.lr": {"grid": rates}}, **asked)
    sweep_id = launch.submit(spec, settings, store)
    records = Records(settings.storage, sweep_id)
    while not any(trial.state is TrialState.FINISHED for trial in records.trials()):
        assert not store.get_job(sweep_id).status.final, kept_log(settings.storage, sweep_id)
        time.sleep(0.2)
    for process in _drivers(sweep_id):
        process.send_signal(signal.SIGKILL)
    while ray_jobs.status(sweep_id, url) == "RUNNING":
        time.sleep(0.2)
    before = [trial for trial in records.trials() if trial.state.final]
    assert 1 <= len(before) < len(rates)
    numbers = [trial.number for trial in before]
    curves = {trial.run_id: registry.metric_history(trial.run_id, "train/loss") for trial in before}
    written = {n: (Path(records.location) / f"results/{n:03d}.json").stat().st_mtime_ns for n in numbers}

    while store.get_job(sweep_id).attempt == 1 or store.get_job(sweep_id).status != "running":
        time.sleep(0.2)  # its controller starts another driver
    assert jobs.stop(sweep_id, settings, store, JobStatus.PAUSED).status == "paused"
    while ray_jobs.status(f"{sweep_id}-2", url) == "RUNNING":
        time.sleep(0.2)
    while _drivers(sweep_id):  # the last one may still be ending
        time.sleep(0.2)
    jobs.resume(sweep_id, settings, store)
    lines = []
    job = jobs.until_end(sweep_id, settings, store, lines.append)
    result = launch.result_of(job, settings)
    assert (job.attempt, job.submission_id) == (3, f"{sweep_id}-3")

    after = records.trials()
    assert result["kept"] >= len(before)
    for trial in before:
        assert after[trial.number].outcome == trial.outcome
        assert registry.metric_history(trial.run_id, "train/loss") == curves[trial.run_id]
    assert written == {n: (Path(records.location) / f"results/{n:03d}.json").stat().st_mtime_ns for n in written}
    assert [trial.state.value for trial in after] == ["finished", "finished", "failed"]
    assert "the loss is" in after[2].message
    assert all(trial.attempt == 1 for trial in after)
    assert any("dev loss" in line for line in lines), "a table while it runs"

    best = min((trial for trial in after if trial.state is TrialState.FINISHED), key=lambda trial: trial.loss)
    assert result["best"]["trial"] == best.number
    version = registry.get("acme.colours")
    assert (version.ref, version.run_id, version.digest) == (result["model"], best.run_id, best.outcome.digest)
    manifest = json.loads((registry.download(version) / MANIFEST).read_text())
    assert manifest["sweep"]["id"] == sweep_id
    assert manifest["sweep"]["trial"] == best.number
    assert manifest["sweep"]["parameters"] == best.parameters
    parents = {registry.client.get_run(trial.run_id).data.tags["mlflow.parentRunId"] for trial in after}
    assert parents == {result["run_id"]}
    kept = registry.download_artifacts(result["run_id"], "sweep", tmp_path)
    assert {path.name for path in kept.iterdir()} == {"summary.json", "trials.csv", "parallel.png"}
    assert (settings.home / "sweeps" / sweep_id / "parallel.png").is_file()


def _drivers(sweep_id):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "pedro.training.sweep.job" in words and sweep_id in words:
            found.append(process)
    return found


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


def test_jobs_that_share_a_worker_outlive_it_and_one_that_fails_fails_alone(home, whole, tmp_path):
    settings, registry, store, _ = home
    specs = [spec_for(tmp_path, resources={"share": True}, **LONG) for _ in range(2)]
    specs.append(spec_for(tmp_path, resources={"share": True}, **{**LONG, "lr": 100, "clip": 0, "warmup": 0.0}))
    names = ("amber", "birch", "cedar")
    specs = [spec.model_copy(update={"adapter": name}) for spec, name in zip(specs, names, strict=True)]
    started = jobs.submit_all(specs, settings, store)
    _wait_for_checkpoints(settings, started[0])
    assert len({store.get_job(job).submission_id for job in started}) == 1
    (victim,) = _actors(settings, "GroupWorker")
    given = victim.environ()
    assert not {name for name in NOT_FOR_WORKERS if given.get(name)}, "it opens neither MLflow nor the database"
    victim.send_signal(signal.SIGKILL)
    with pytest.raises(TrainingError, match="the loss is"):
        jobs.wait(started[2], settings, store)
    for job, spec in zip(started[:2], specs, strict=False):
        result = jobs.wait(job, settings, store)
        assert (result.steps, result.optimizer_steps) == (40, 80)
        assert result.metrics["accuracy"] == whole(1)["metrics"]["accuracy"]
        assert registry.get(spec.name).digest == result.digest
        assert "resumed at step" in kept_log(settings.storage, job), "alone, from a checkpoint of its own"
    with pytest.raises(NotFoundError):
        registry.get(specs[2].name)


def _wait_for_log(settings, job, lines):
    """Until what is kept has these lines and the result, which is copied after the job's end."""
    deadline = time.monotonic() + 300
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
    with pytest.raises(ConfigError, match=r"needs 4096 CPU, but this machine has \d+ CPU; lower"):
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
