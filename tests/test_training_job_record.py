"""A job's record and its log: written by its driver, kept when the cluster is gone, changed by nobody who looks."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
import uuid

import pytest
from store_moves import stub_version
from training_runs import context_for, run, spec_for

from pedro import cli
from pedro.config import Settings
from pedro.errors import NotFoundError, UnavailableError
from pedro.store import JobRecord, JobStatus, Store
from pedro.training import job
from pedro.training.driver import drive
from pedro.training.job_log import keeping_log, kept_log
from pedro.training.job_record import OwnRecord
from pedro.training.job_status import ClusterJobs, reconcile_record
from pedro.training.job_usage import enter_training


@pytest.fixture
def settings(tmp_path, monkeypatch) -> Settings:
    """Those of a fresh home, which the environment names."""
    found = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    for name, value in found.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return found


@pytest.fixture
def store(settings):
    opened = Store(settings.database_url)
    yield opened
    opened.close()


def _driver(tmp_path, job_id, train="nowhere.jsonl") -> int:
    tree = spec_for(tmp_path).to_dict()
    tree["data"]["train"] = str(tmp_path / "home" / train)
    (tmp_path / "spec.json").write_text(json.dumps(tree))
    return job.main(["--spec", str(tmp_path / "spec.json"), "--job-id", job_id])


def test_a_driver_enters_its_own_failure_with_the_true_reason_and_keeps_its_log(tmp_path, settings, store):
    made = store.create_job("acme", "colours", {})
    assert _driver(tmp_path, made.id) == 1
    record = store.get_job(made.id)
    assert record.status == "failed"
    assert "nowhere.jsonl' cannot be read: No such file" in record.message
    assert kept_log(settings.storage, made.id) == f"error: {record.message}\n"


def test_a_job_that_was_cancelled_while_it_waited_does_not_start(tmp_path, store, capsys):
    made = store.create_job("acme", "colours", {})
    store.update_job(made.id, status="cancelled", message="stopped")
    assert _driver(tmp_path, made.id, "train.jsonl") == 1
    assert "is cancelled and cannot become running" in capsys.readouterr().err
    assert store.get_job(made.id).message == "stopped"


def test_a_record_goes_by_running_to_its_end_and_the_first_end_stays(settings, store):
    made = store.create_job("acme", "colours", {})
    own = OwnRecord(settings.database_url, made.id, print)
    own.running()
    assert store.get_job(made.id).status == "running"
    store.update_job(made.id, status="queued")  # as if the database had not answered at the start
    own.succeeded({"model": "acme.colours:1"})
    own.stopped()
    assert store.get_job(made.id).status == "succeeded"
    assert store.get_job(made.id).result == {"model": "acme.colours:1"}
    OwnRecord(settings.database_url, "ftjob-unknown", print).running()


def test_what_a_job_trained_is_entered_once_as_of_its_last_checkpoint(tmp_path, settings, store):
    kept = tmp_path / "home" / "storage" / "runs" / "ftjob-1"
    enter_training(settings, "ftjob-1", "acme.colours", print)
    assert store.usage() == [], "it has no checkpoint yet"
    outcome = run(context_for(spec_for(tmp_path), tmp_path), kept / "checkpoint_2")
    (kept / "checkpoint_2" / "last").rename(kept / "checkpoint_2" / "state")
    (kept / "checkpoint_3" / "adapter").mkdir(parents=True)  # the last one holds the adapter and no state
    for _ in range(2):
        enter_training(settings, "ftjob-1", "acme.colours", print)
    (used,) = store.usage()
    assert (used.tenant, used.model, used.key_id, used.requests) == ("acme", "acme.colours", "", 0)
    assert used.training_tokens == outcome.all_tokens > 0
    assert used.training_seconds == pytest.approx(outcome.seconds, abs=0.001)


def test_a_driver_that_is_stopped_enters_whether_that_was_a_pause(settings, store):
    for wanted in (JobStatus.PAUSED, JobStatus.CANCELLED):
        made = store.create_job("acme", "colours", {}, queued=True)
        own = OwnRecord(settings.database_url, made.id, print, attempt=1)
        own.running()
        store.ask_of_job(made.id, wanted)
        own.stopped()
        assert (store.get_job(made.id).status, store.get_job(made.id).wanted) == (wanted, None)


def test_a_driver_that_is_ended_though_nobody_asked_leaves_its_job_to_the_controller(settings, store):
    made = store.create_job("acme", "colours", {}, queued=True)
    own = OwnRecord(settings.database_url, made.id, print, attempt=1)
    own.running()
    own.stopped()
    assert store.get_job(made.id).status == "running"


def test_a_driver_that_the_platform_does_not_answer_leaves_its_job_to_the_controller(settings, store, capsys):
    def away():
        raise UnavailableError("MLflow does not answer")

    queued, direct = (store.create_job("acme", "colours", {}, queued=queued) for queued in (True, False))
    for made, attempt, status in ((queued, 1, "running"), (direct, None, "failed")):
        own = OwnRecord(settings.database_url, made.id, print, attempt)
        own.running()
        assert drive(away, "job", "look", own) == 1
        assert (store.get_job(made.id).status, store.get_job(made.id).message) == (status, "MLflow does not answer")
    assert "error: MLflow does not answer" in capsys.readouterr().err


def test_a_driver_that_another_attempt_has_replaced_does_not_start(tmp_path, settings, store, capsys):
    made = store.create_job("acme", "colours", {}, queued=True)
    (leased,) = store.lease_jobs("controller", 1.0, 2.0).jobs
    assert store.start_job(leased, made.id, 0)
    assert store.requeue_job(leased, "lost")
    words = ["--spec", str(tmp_path / "spec.json"), "--job-id", made.id, "--attempt", "1"]
    assert job.main(words) == 1
    assert "is at attempt 2, past 1" in capsys.readouterr().err
    assert store.get_job(made.id).status == "queued"


def _record(
    status="running", submission_id: str | None = "ftjob-1", age_s=60.0, message="", attempt: int = 0
) -> JobRecord:
    return JobRecord(
        "ftjob-1", "acme", "a", {}, JobStatus(status), submission_id, time.time() - age_s, None, None, message,
        attempt=attempt,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("record", "told", "asked", "status", "message"),
    [
        (_record("succeeded", message="x"), None, True, "succeeded", "x"),
        (_record("queued"), "RUNNING", True, "running", ""),
        (_record(), "FAILED", True, "failed", "its driver died: exit code 137"),
        (_record(), None, True, "lost", "its cluster was ended"),
        (_record(), None, False, "running", ""),
        (_record("paused"), None, True, "paused", ""),
        (_record("queued", None), None, True, "queued", ""),
        (_record("queued", None, age_s=7200), None, True, "lost", "it was never submitted to a cluster"),
        (_record("queued", None, 7200, "waits for 2 CPU", 1), None, True, "queued", "waits for 2 CPU"),
        (_record(attempt=1), None, True, "running", "its cluster was ended; it will be restarted"),
        (_record(attempt=1), "FAILED", True, "running", "its driver died; it will be restarted"),
        (_record(attempt=1), None, False, "running", ""),
        (_record("queued", None, message="waits for 2 CPU", attempt=2), "STOPPED", True, "queued", "waits for 2 CPU"),
    ],
)
def test_what_a_record_means_is_computed_from_it_and_the_clusters_word(record, told, asked, status, message):
    jobs = {record.id: {"status": told, "message": "exit code 137\nand a page of its log"}} if told else {}
    job = reconcile_record(record, ClusterJobs(jobs, "http://ray", problem="" if asked else "no answer"))
    assert (job.status, job.message) == (status, message)


def _pedro(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["pedro", *words])
    with pytest.raises(SystemExit):
        cli.main()


def test_listing_shows_a_lost_job_and_writes_nothing(settings, store, monkeypatch, capsys):
    made = store.create_job("acme", "colours", {})
    store.update_job(made.id, status="running", submission_id=made.id)
    watch = sqlite3.connect(settings.database_url.removeprefix("sqlite:///"))
    before = watch.execute("PRAGMA data_version").fetchone()
    _pedro(monkeypatch, "jobs", "list", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["status"], row["message"], row["finished"]) == ("lost", "its cluster was ended", None)
    assert watch.execute("PRAGMA data_version").fetchone() == before
    assert store.get_job(made.id).status == "running"


def test_one_job_is_shown_with_what_it_told_and_nothing_is_written(settings, store, monkeypatch, capsys):
    store.add_version(stub_version(1, "acme.colours"), None)
    asked = {"method": {"name": "lora"}, "parent": "acme.colours:1"}
    made = store.create_job("acme", "colours", asked, queued=True).id
    store.update_job(made, status="running", submission_id=made)
    for step in range(1, 4):
        store.add_job_event(made, f"Step {step}: training loss={step}", kind="metrics", data={"step": step})
    store.update_job(made, status="succeeded", result={"model": "acme.colours:2", "gate": "passed"})
    _pedro(monkeypatch, "jobs", "show", made)
    shown = capsys.readouterr().out
    for words in ("acme.colours:1", "lora", "succeeded", "acme.colours:2", "passed", "Step 1: training loss=1"):
        assert words in shown
    _pedro(monkeypatch, "jobs", "show", made, "--events", "2", "--json")
    row = json.loads(capsys.readouterr().out)
    assert (row["id"], row["status"], row["result"]["model"]) == (made, "succeeded", "acme.colours:2")
    assert [event["message"] for event in row["events"]] == ["Step 3: training loss=3", "The job was succeeded"]
    lost = store.create_job("acme", "colours", {}).id
    store.update_job(lost, status="running", submission_id=lost)
    _pedro(monkeypatch, "jobs", "show", lost, "--json")
    assert json.loads(capsys.readouterr().out)["status"] == "lost"
    assert store.get_job(lost).status == "running"


def test_a_log_is_read_after_its_cluster_is_gone(settings, monkeypatch, capsys):
    with keeping_log(settings.storage, "ftjob-1"):
        print("\x1b[36m(RayTrainWorker pid=8)\x1b[0m step 10/300 · loss 2.806")
        print("(driver pid=6) Traceback (most recent call last):", file=sys.stderr)
        print('{"model": "acme.colours:1"}')
    capsys.readouterr()
    _pedro(monkeypatch, "jobs", "logs", "ftjob-1")
    assert capsys.readouterr().out == "step 10/300 · loss 2.806\n"
    _pedro(monkeypatch, "jobs", "logs", "ftjob-1", "--raw")
    assert "Traceback" in capsys.readouterr().out
    with pytest.raises(NotFoundError):
        kept_log(settings.storage, "../../etc/passwd")


def test_a_log_behind_a_url_is_whole_at_the_end_and_goes_on_after_a_restart():
    storage = f"memory://{uuid.uuid4().hex}"
    for line in ("first driver", "second driver"):
        with keeping_log(storage, "ftjob-1"):
            print(line)
    assert kept_log(storage, "ftjob-1") == "first driver\nsecond driver\n"


def test_a_log_that_cannot_be_kept_does_not_stop_the_job(tmp_path, capsys):
    (tmp_path / "file").touch()
    with keeping_log(str(tmp_path / "file"), "ftjob-1"):
        print("the job goes on")
    shown = capsys.readouterr()
    assert (shown.out, "log cannot be stored" in shown.err) == ("the job goes on\n", True)
