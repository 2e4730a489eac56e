"""Jobs on their way into the queue, and what a person reads of them."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus as RayStatus

from pedro.config import Settings
from pedro.errors import ConfigError, ConflictError, DataError, TrainingError, UnavailableError
from pedro.store import Store
from pedro.training import ray_jobs, storage, submit
from pedro.training.lost_workers import TellLosses
from pedro.training.queue import launcher as launchers
from pedro.training.queue.launcher import ClusterView, RayJobs
from pedro.training.queue.prepare import told_error
from pedro.training.ray_jobs import for_people, readable
from pedro.training.spec import FineTuneSpec

LOG = """\
2026-01-05 10:00:00,000\tINFO job_manager.py:581 -- Runtime env is setting up.
Running entrypoint for job ftjob-1: python -m pedro.training.job --spec 's.json' --job-id ftjob-1
acme.voice: examples: 2,800 in train, 334 in test
\x1b[36m(TrainController pid=7)\x1b[0m Attempting to start training worker group of size 1
\x1b[36m(RayTrainWorker pid=8)\x1b[0m training 21,320 parameters on 2,228 rows, 300 steps
\x1b[36m(RayTrainWorker pid=8, ip=10.0.0.3)\x1b[0m step 10/300 · loss 2.806 · 574 tokens/s · 0:04 left
\x1b[36m(RayTrainWorker pid=8)\x1b[0m Reporting training result 1: TrainingReport(checkpoint=None)
(driver pid=6) Traceback (most recent call last):
error: data.train: line 3: prompt: missing
\x1b[36m(TrainController pid=7)\x1b[0m worker 0 was lost (The actor died); replaced, 1 of at most 3 times
[2026-01-05 10:00:09,000 E 6 6] (python-core-driver-01) shutdown.cc:41: *** SIGTERM received at time=1767607209 ***
PC: @     0x7f0b1c0d4e2e  (unknown)  epoll_wait
    @     0x7f0b1bfe0520  (unknown)  (unknown)
*** SIGTERM received at time=1767607209 on cpu 1 ***
{"model": "acme.voice:1"}
"""


def test_progress_reads_clean_and_frameworks_keep_to_themselves():
    assert list(readable(LOG.splitlines())) == [
        "acme.voice: examples: 2,800 in train, 334 in test",
        "training 21,320 parameters on 2,228 rows, 300 steps",
        "step 10/300 · loss 2.806 · 574 tokens/s · 0:04 left",
        "error: data.train: line 3: prompt: missing",
        "worker 0 was lost (The actor died); replaced, 1 of at most 3 times",
        '{"model": "acme.voice:1"}',
    ]
    assert list(for_people(['{"model": "acme.voice:1"}', "{braces} are no result"])) == ["{braces} are no result"]


def test_each_loss_of_workers_is_a_line_that_people_see(capsys):
    told = TellLosses(max_failures=1)
    died = RuntimeError("Worker failed.\n\nThe actor died unexpectedly.")
    told.after_exception(None, {0: died})
    told.after_exception(None, {0: died, 1: died})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "worker 0 was lost (The actor died unexpectedly); replaced, 1 of at most 1 times; "
        "training resumes from the last checkpoint",
        "worker processes 0, 1 were lost (The actor died unexpectedly); no more are replaced",
    ]
    assert list(readable(f"(TrainController pid=7) {line}" for line in printed)) == printed


@pytest.mark.parametrize("home", ["it's mine", 'a "b" $HOME; c'])
def test_no_path_breaks_the_line_that_starts_a_driver(tmp_path, monkeypatch, home):
    sent = []
    python = "/opt/my tools/python"
    monkeypatch.setattr(ray_jobs, "_client", lambda url: SimpleNamespace(submit_job=lambda **job: sent.append(job)))
    monkeypatch.setattr(ray_jobs, "_python", lambda url: python)
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / home)})
    launcher = RayJobs(settings, print)
    monkeypatch.setattr(launcher, "_connected", lambda: "http://127.0.0.1:1")
    store = Store(f"sqlite:///{tmp_path / 'pedro.db'}")
    job = store.create_job("acme", "support", {}, "ftjob-1", queued=True)
    store.close()
    launcher.start(job, "ftjob-1")
    words = shlex.split(sent[0]["entrypoint"])
    location = f"{settings.storage}/jobs/ftjob-1/spec.json"
    assert words == [
        python, "-m", "pedro.training.job", "--spec", location, "--job-id", "ftjob-1", "--attempt", "1",
    ]  # fmt: skip
    assert sent[0]["metadata"] == {"tenant": "acme", "adapter": "support", "job": "ftjob-1"}


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_job_over_http_that_this_machine_could_never_hold_is_refused_and_one_of_a_cluster_waits(
    tmp_path, monkeypatch, address
):
    monkeypatch.setattr(launchers, "prepare", lambda job, settings: None)
    env = {"PEDRO_HOME": str(tmp_path / "home")} | ({"RAY_ADDRESS": address} if address else {})
    settings = Settings.from_env(env)
    launcher = RayJobs(settings, print)
    monkeypatch.setattr(launcher, "look", lambda: ClusterView({}, [{"CPU": 2.0}]))
    store = Store(settings.database_url)
    fits, never = (
        store.ask_for_job("acme", "voice", {"resources": {"workers": workers}}, key_id="key_1") for workers in (2, 3)
    )
    store.close()
    launcher.prepare(fits)
    if address:
        launcher.prepare(never)
        return
    with pytest.raises(ConfigError, match="needs 3 times 1 CPU, but this machine has 2 CPU; lower") as refused:
        launcher.prepare(never)
    assert told_error(refused.value) == {"code": "invalid_config", "param": "method.pedro.resources"}


def test_a_cluster_that_tells_of_no_node_or_nothing_ends_no_job(tmp_path, monkeypatch):
    """It is asked again, whatever Ray raises."""
    monkeypatch.setattr(launchers, "prepare", lambda job, settings: None)
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    launcher = RayJobs(settings, print)
    store = Store(settings.database_url)
    job = store.ask_for_job("acme", "voice", {"resources": {"workers": 9}}, key_id="key_1")
    store.close()
    monkeypatch.setattr(launcher, "_connected", lambda: "http://127.0.0.1:1")
    monkeypatch.setattr(launchers, "_look", lambda _url: ClusterView({}))
    launcher.prepare(job)

    def broken(_url):
        raise Exception("the API is limited")

    monkeypatch.setattr(launchers, "_look", broken)
    with pytest.raises(UnavailableError, match="the API is limited"):
        launcher.prepare(job)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Settings and store of a home whose queue has a controller, which does nothing."""
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    store = Store(settings.database_url)
    monkeypatch.setattr(submit, "hand_over", lambda job_id, settings, store: None)
    yield settings, store
    store.close()


def test_a_job_is_queued_when_all_that_it_needs_lies_in_the_storage(queue, tmp_path):
    settings, store = queue
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    spec = FineTuneSpec(tenant="acme", adapter="support", data={"train": str(data)})
    job = store.get_job(submit.submit(spec, settings, store, priority=3))
    assert (job.status, job.attempt, job.priority, job.name) == ("queued", 1, 3, "acme.support")
    stored = json.loads((Path(settings.storage) / "jobs" / job.id / "spec.json").read_text())
    data.unlink()
    assert Path(stored["data"]["train"]).read_text().startswith('{"prompt"')
    with pytest.raises(DataError):
        submit.submit(spec, settings, store)
    assert len(store.list_jobs()) == 1, "what cannot be read is no job"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({"status": "failed", "message": "data.train: line 3"}, "data.train: line 3"),
        ({"status": "cancelled"}, "was stopped"),
        ({"status": "paused"}, "pedro jobs resume"),
    ],
)
def test_following_a_job_shows_why_it_waits_then_its_lines_and_raises_how_it_ended(queue, end, said):
    settings, store = queue
    job = store.create_job("acme", "support", {}, queued=True)
    seen = []

    def see(line):
        seen.append(line)
        if len(seen) == 1:
            log = Path(settings.storage) / "jobs" / job.id / "log.txt"
            log.parent.mkdir(parents=True)
            log.write_text(LOG)
            store.update_job(job.id, status="running")
            store.update_job(job.id, **end)

    store.update_job(job.id, message="waits for 2 CPU to be free")
    with pytest.raises(TrainingError, match=said):
        submit.wait(job.id, settings, store, see)
    assert seen[:2] == ["waits for 2 CPU to be free", "acme.voice: examples: 2,800 in train, 334 in test"]
    assert not any(line.startswith(("{", "error")) for line in seen)


def test_a_storage_without_credentials_is_one_clear_line_and_makes_no_job(queue, tmp_path, monkeypatch):
    settings, store = queue

    class Locked:  # as s3fs: what botocore raises is no OSError
        def __getattr__(self, asked):
            def refuse(*_args, **_options):
                raise RuntimeError("Unable to locate\n credentials")

            return refuse

    monkeypatch.setattr(storage, "_filesystem", lambda url: (Locked(), url.partition("://")[2]))
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    spec = FineTuneSpec(tenant="acme", adapter="support", data={"train": str(tmp_path / "train.jsonl")})
    for ask in (
        lambda: submit.submit(spec, replace(settings, storage="s3://bucket/x"), store),
        lambda: storage.read_text("s3://bucket/x/jobs/a/log.txt"),
        lambda: storage.folders("s3://bucket/x/runs"),
    ):
        with pytest.raises(
            UnavailableError, match=r"s3://bucket/x/\S+ could not be .*Unable to locate credentials\); check"
        ):
            ask()
    assert store.list_jobs() == []


def test_a_job_of_an_earlier_release_is_not_stopped_through_the_queue(queue):
    settings, store = queue
    old = store.create_job("acme", "support", {})
    with pytest.raises(ConflictError, match="earlier release"):
        submit.stop(old.id, settings, store)


@pytest.mark.parametrize("ray", ["STOPPED", "SUCCEEDED"])
def test_stopping_a_sweep_says_how_it_ended(monkeypatch, ray):
    client = SimpleNamespace(stop_job=lambda job: ray == "STOPPED", get_job_status=lambda job: RayStatus(ray))
    monkeypatch.setattr(ray_jobs, "_client", lambda url: client)
    assert ray_jobs.stop("sweep-1", "http://127.0.0.1:1") == {"STOPPED": "cancelled"}.get(ray, "succeeded")
