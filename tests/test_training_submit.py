"""What a person reads of a job's log."""

import shlex
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from pedro.config import Settings
from pedro.store import Store
from pedro.training import submit
from pedro.training.spec import FineTuneSpec
from pedro.training.submit import for_people, readable

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


@pytest.mark.parametrize("home", ["it's mine", 'a "b" $HOME; c'])
def test_no_path_breaks_the_line_that_starts_a_job(tmp_path, monkeypatch, home):
    sent = []
    python = "/opt/my tools/python"
    monkeypatch.setattr(submit, "_client", lambda url: SimpleNamespace(submit_job=lambda **job: sent.append(job)))
    monkeypatch.setattr(submit, "_python", lambda url: python)
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / home)})
    spec = FineTuneSpec(tenant="acme", adapter="support", data={"train": str(data)})
    submit.submit(spec, settings, "http://127.0.0.1:1", job_id="ftjob-1")
    words = shlex.split(sent[0]["entrypoint"])
    location = f"{settings.storage}/jobs/ftjob-1/spec.json"
    assert words == [python, "-m", "pedro.training.job", "--spec", location, "--job-id", "ftjob-1"]


@pytest.mark.parametrize(
    ("stored", "ray", "said"), [("succeeded", "SUCCEEDED", "succeeded"), ("running", "STOPPED", "cancelled")]
)
def test_stopping_a_job_says_how_it_ended_and_changes_no_end(tmp_path, monkeypatch, stored, ray, said):
    store = Store(f"sqlite:///{tmp_path / 'pedro.db'}")
    made = store.create_job("acme", "support", {})
    store.update_job(made.id, status="running", submission_id=made.id)
    store.update_job(made.id, status=stored)
    client = SimpleNamespace(stop_job=lambda job: ray == "STOPPED", get_job_status=lambda job: JobStatus(ray))
    monkeypatch.setattr(submit, "_client", lambda url: client)
    assert submit.stop(made.id, "http://127.0.0.1:1", store) == said
    assert store.get_job(made.id).status == said
    assert submit.stop("sweep-1", "http://127.0.0.1:1", store) == said  # which the records do not know
    store.close()
