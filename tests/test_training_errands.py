"""A job's workers hold nothing that opens the platform: what they are handed, and what their driver does for them."""

from __future__ import annotations

import json
import pickle
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Event
from types import SimpleNamespace

import pytest
from errand_workers import Worker, ended, started
from ray.train import Checkpoint
from retention_home import open_home, version
from serving_adapters import stub_adapter
from training_runs import spec_for

from pedro.config import NOT_FOR_WORKERS, Settings
from pedro.errors import ConfigError, UnavailableError
from pedro.registry import Registry
from pedro.store import checkpoint_of
from pedro.training import lean_trainer, outbox, trainer
from pedro.training.errands import Errands
from pedro.training.handed_adapters import HandedAdapter, hand
from pedro.training.outbox import MODEL, THE_CHAMPION
from pedro.training.worker_group import WorkerGroup

SECRET = "hunter2"
OPENERS = {
    "MLFLOW_TRACKING_URI": f"https://ops:{SECRET}@mlflow",
    "PEDRO_DATABASE_URL": f"postgresql://pedro:{SECRET}@db/pedro",
    "PEDRO_SEAL_KEY_FILE": "/etc/pedro/seal/key",
    "PEDRO_WEBHOOK_KEY_FILE": "/etc/pedro/webhook/key",
}
HARMLESS = {
    "RAY_ADDRESS",
    "PEDRO_LAUNCHER",
    "PEDRO_LOG_FORMAT",
    "PEDRO_WEBHOOK_NETWORKS",
    "PEDRO_SHARE_ACROSS_TENANTS",
    "HOME",
}


def test_what_a_training_run_is_handed_names_no_secret_and_no_file_with_one(tmp_path, monkeypatch):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home"), **OPENERS})
    settings.env()  # its files are written
    handed = {}

    class Fake:
        def __init__(self, loop, **options):
            handed.update(options)

        def fit(self):
            raise ConfigError("seen")

    monkeypatch.setattr(lean_trainer, "LeanTorchTrainer", Fake)
    with pytest.raises(ConfigError, match="seen"):
        trainer.fit(spec_for(tmp_path), settings, "run", "ftjob-1", tmp_path)
    run = handed["run_config"]
    assert not any(isinstance(callback, Errands) for callback in run.callbacks), "they are sent to the workers"
    seen = pickle.dumps([handed["train_loop_config"], run.worker_runtime_env, run.callbacks])
    files = [str(path).encode() for path in (tmp_path / "home" / "secrets").iterdir()]
    assert len(files) == 2
    for secret in (SECRET.encode(), b"@mlflow", b"@db", b"/etc/pedro", *files):
        assert secret not in seen, secret
    assert pickle.loads(pickle.dumps(handed["errands"]))._model.name == "acme.colours", "a trial's controller takes it"
    assert SECRET.encode() not in pickle.dumps(handed["errands"])


def test_a_workers_variables_empty_whatever_else_the_settings_are_read_from():
    read = set()

    class Recorder(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

    Settings.from_env(Recorder({"MLFLOW_TRACKING_URI": "http://mlflow", "PEDRO_DATABASE_URL": "postgresql://a@b/c"}))
    variables = Settings.from_env({}).env_of_workers()
    assert {name for name in variables if not variables[name]} >= set(NOT_FOR_WORKERS)
    assert read - HARMLESS <= variables.keys()
    theirs = Settings.from_env({**OPENERS, **variables})
    assert (theirs.tracking_uri, theirs.database_url) == (
        f"sqlite:///{theirs.home}/mlflow.db",
        f"sqlite:///{theirs.home}/pedro.db",
    )


class Lost:
    """A worker that died."""

    def execute_async(self, *_):
        broken = Future()
        broken.set_exception(RuntimeError("the actor died"))
        return SimpleNamespace(future=lambda: broken)


@pytest.fixture
def home(tmp_path):
    settings, registry = open_home(tmp_path / "home")
    yield settings, registry
    registry.store.close()


def asked(errands, worker, about=THE_CHAMPION):
    """What the worker hears while the driver looks after it."""
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(worker.outbox.ask, about)
        while not wait([heard], 0.01).done:
            errands.after_worker_group_poll_status(None)
    return heard.result()


def test_points_go_to_the_run_and_the_jobs_events_the_last_ones_too(home):
    settings, registry = home
    job = registry.store.create_job("acme", "colours", {}).id
    run = registry.start_run(experiment="acme.colours", name=job, params={}, tags={})
    worker = Worker()
    errands = started(settings, worker, run, job)
    worker.outbox.tell(1, {"train/loss": 2.0})
    errands.after_worker_group_poll_status(None)
    worker.outbox.tell(2, {"train/loss": 1.0})
    ended(errands)
    assert registry.metric_history(run, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert len(registry.store.list_job_events(job, ("metrics",), limit=10)) == 2


def test_a_point_that_cannot_be_logged_is_dropped_and_a_lost_worker_is_no_error(home, monkeypatch):
    settings, _ = home
    worker, logged = Worker(), []

    def log(registry, run_id, job_id, step, values):
        if step == 1:
            raise OSError("MLflow is away")
        logged.append(step)

    monkeypatch.setattr("pedro.training.errands.log_point", log)
    errands = started(settings, worker)
    worker.outbox.tell(1, {})
    worker.outbox.tell(2, {})
    errands.after_worker_group_poll_status(None)
    errands.after_worker_group_start(SimpleNamespace(get_workers=lambda: [Lost()]))
    errands.after_worker_group_poll_status(None)
    ended(errands)
    assert logged == [2]


def test_a_worker_that_asks_is_handed_the_present_champion_or_hears_why_not(home, tmp_path, monkeypatch):
    settings, registry = home
    worker = Worker()
    errands = started(settings, worker)
    assert asked(errands, worker) is None
    made = version(registry, tmp_path, "acme.colours", "one")
    registry.promote("acme.colours", 1)
    handed = asked(errands, worker)
    assert (handed.ref, handed.version, handed.problem) == ("acme.colours:1", 1, "")
    with handed.here() as directory:
        assert json.loads((directory / "pedro_adapter.json").read_text())["digest"] == made.digest
    with pytest.raises(UnavailableError, match="did not return the password"):
        asked(errands, worker, "password")
    monkeypatch.setattr(Registry, "get", partial(away, "the database does not answer"))
    with pytest.raises(UnavailableError, match="the database does not answer"):
        asked(errands, worker)
    ended(errands)


def away(why, *_):
    raise UnavailableError(why)


def test_a_champion_whose_files_are_gone_is_handed_with_the_reason(home, tmp_path, monkeypatch):
    settings, registry = home
    version(registry, tmp_path, "acme.colours", "one")
    registry.promote("acme.colours", 1)
    monkeypatch.setattr(Registry, "download", partial(away, "its files are gone"))
    worker = Worker()
    errands = started(settings, worker)
    handed = asked(errands, worker)
    assert (handed.version, handed.problem, handed.files) == (1, "its files are gone", ())
    ended(errands)


def test_a_question_does_not_wait_for_checkpoints_that_are_published(home, tmp_path, monkeypatch):
    settings, _ = home
    stub_adapter(tmp_path / "adapter", "one", "sha256:bb")
    report = SimpleNamespace(checkpoint=Checkpoint.from_directory(tmp_path))
    answered, waited = Event(), []
    monkeypatch.setattr("pedro.training.errands.publish", lambda *_: waited.append(answered.wait(60)))
    worker = Worker()
    errands = started(settings, worker)
    errands.after_report(report, [{MODEL: {"step": 1}}])
    assert asked(errands, worker) is None
    answered.set()
    ended(errands)
    assert waited == [True]


def test_a_question_whose_answer_was_lost_is_asked_again_and_a_second_answer_is_dropped(home, monkeypatch):
    settings, _ = home
    monkeypatch.setattr(outbox, "AGAIN_S", 0.01)
    worker = Worker()
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(worker.outbox.ask, THE_CHAMPION)
        while not worker.outbox.take():  # the driver's call never came back
            pass
        errands = started(settings, worker)
        while not wait([heard], 0.01).done:
            errands.after_worker_group_poll_status(None)
    assert heard.result() is None
    worker.outbox.answer(0, UnavailableError("late"))
    worker.outbox.answer(0, "later")
    ended(errands)


def test_a_question_that_is_asked_again_while_it_is_answered_is_answered_once(home, monkeypatch):
    settings, _ = home
    monkeypatch.setattr(outbox, "AGAIN_S", 0.01)
    worker, seen, looks = Worker(), [], []

    def get(*_):
        seen.append("asked")
        while len(looks) < 20:
            time.sleep(0.001)
        raise UnavailableError("slow")

    monkeypatch.setattr(Registry, "get", get)
    errands = started(settings, worker)
    with ThreadPoolExecutor(1) as pool:
        heard = pool.submit(worker.outbox.ask, THE_CHAMPION)
        while len(looks) < 20:
            if taken := worker.outbox.take():
                looked = Future()
                looked.set_result(taken)
                errands._found(worker, looked)
                looks.append(taken)
        assert isinstance(heard.exception(), UnavailableError)
    assert len(seen) == 1
    ended(errands)


@pytest.mark.parametrize("parent", [None, HandedAdapter("acme.colours:1", 1)])
def test_what_the_first_worker_cannot_have_ends_the_others_too(tmp_path, monkeypatch, parent):
    class Second(WorkerGroup):
        def gather(self, value):
            return [UnavailableError("no answer"), value]

    steps = []
    model = SimpleNamespace(plan=SimpleNamespace(steps=1))
    monkeypatch.setattr("pedro.training.context.engine_for", lambda *_: None)
    monkeypatch.setattr("pedro.training.context.build_context", lambda *_, **__: steps.append("built") or model)
    monkeypatch.setattr("pedro.training.worker.train_and_score", lambda *_: steps.append("trained"))
    monkeypatch.setattr("pedro.training.worker.save", lambda *_: steps.append("saved"))
    monkeypatch.setattr(trainer, "_report", lambda *_: steps.append("waits for ever"))
    config = {"parent": parent, "checkpoint_models": False, "extra": {}}
    with pytest.raises(UnavailableError, match="no answer"):
        trainer._train(spec_for(tmp_path), Settings.from_env({}), Second(1, 2), config)
    assert steps == ([] if parent else ["built", "trained", "saved"])


def test_an_adapter_is_handed_through_the_storage_where_hosts_share_no_home(home, tmp_path):
    settings, registry = home
    made = version(registry, tmp_path, "acme.colours", "one")
    elsewhere = Settings.from_env({"PEDRO_HOME": str(settings.home), "PEDRO_STORAGE": f"file://{tmp_path}/bucket"})
    handed = hand(made, registry, elsewhere, "ftjob-1")
    assert handed.folder.startswith(f"file://{tmp_path}/bucket/runs/ftjob-1/")
    own = registry.download(made)
    with handed.here() as directory:
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
            path.name: path.read_bytes() for path in own.iterdir()
        }
        assert directory != own


def test_a_kept_checkpoint_becomes_a_version_and_one_that_cannot_is_told(home, tmp_path, capsys):
    settings, registry = home
    job = registry.store.create_job("acme", "colours", {}).id
    run = registry.start_run(experiment="acme.colours", name=job, params={}, tags={})
    errands = started(settings, Worker(), run, job)
    kept = tmp_path / "checkpoint"
    stub_adapter(kept / "adapter", "one", "sha256:bb")
    made = {"step": 5, "best_step": 5, "metrics": {"step": 5, "valid_loss": 1.0}}
    report = SimpleNamespace(checkpoint=Checkpoint.from_directory(kept))
    errands.after_report(report, [{"step": 4}])
    errands.after_report(report, [{"step": 5, MODEL: made}])
    errands.after_report(
        SimpleNamespace(checkpoint=Checkpoint.from_directory(tmp_path)), [{MODEL: {**made, "step": 6}}]
    )
    ended(errands)
    (found,) = registry.versions("acme.colours")
    assert checkpoint_of(found.gate).step == 5
    again = started(settings, Worker(), run, job)
    again.after_report(report, [{"step": 5, MODEL: made}])  # the job went back behind a damaged checkpoint
    ended(again)
    assert len(registry.versions("acme.colours")) == 1
    (event,) = registry.store.list_job_events(job, ("checkpoint",), limit=10)
    assert event.data == {"model": "acme.colours:1", "step": 5, "metrics": made["metrics"]}
    assert "the checkpoint of step 6 was not saved as a model" in capsys.readouterr().out


def test_a_full_disk_under_a_checkpoints_copy_is_told_and_is_no_error(home, tmp_path, monkeypatch, capsys):
    settings, _ = home
    errands = started(settings, Worker())

    def full(**_):
        raise OSError("No space left on device")

    monkeypatch.setattr("pedro.training.waiting_checkpoints.tempfile.TemporaryDirectory", full)
    report = SimpleNamespace(checkpoint=Checkpoint.from_directory(tmp_path))
    errands.after_report(report, [{MODEL: {"step": 6}}])
    monkeypatch.undo()
    ended(errands)
    assert "the checkpoint of step 6 was not saved as a model: No space left" in capsys.readouterr().out
