"""The worker and the driver of jobs that train together, without Ray: what each job says, leaves and is told."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import spec_for, write_rows

from pedro.config import Settings
from pedro.errors import DataError, TrainingError, UnavailableError
from pedro.store import JobStatus, Store
from pedro.training import worker as training_worker
from pedro.training.background import Background
from pedro.training.cotraining import driver as group_driver
from pedro.training.cotraining import job_group
from pedro.training.cotraining import worker as group_worker
from pedro.training.cotraining.job_group import JobGroup, JobOfGroup
from pedro.training.cotraining.worker import CotrainingReporter, Ended, GroupWorker, Line, Member
from pedro.training.job_log import by_thread, keeping_log_of_thread, kept_log
from pedro.training.job_usage import trained_so_far
from pedro.training.outbox import CurvePoint, WorkerQuestion
from pedro.training.storage import put_folder


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(group_worker, "quiet_worker", lambda: None)
    torch.set_num_threads(1)
    return Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})


def member(folder, name, **training):
    own = folder / name
    own.mkdir(exist_ok=True)
    if not (own / "train.jsonl").exists():
        write_rows(own / "train.jsonl", 30)
    spec = spec_for(own, {"name": "pedro", "r": 2}, {"share": True}, max_steps=2, eval_every=1, **training)
    spec = spec.model_copy(update={"tenant": name, "gate": spec.gate.model_copy(update={"max_rows": 4})})
    return Member(f"ftjob-{name}", spec.to_dict(), None)


def trained(members, settings, at=lambda _worker, _job_id, _item: None):
    """Run a worker to its end; what each job said. Questions are answered with None."""
    worker, said = GroupWorker(), {one.job_id: [] for one in members}
    thread = threading.Thread(target=worker.train, args=(members, settings.env_of_workers()), daemon=True)
    thread.start()
    while True:
        alive = thread.is_alive()
        for job_id, item in worker.take():
            said[job_id].append(item)
            at(worker, job_id, item)
            if isinstance(item, WorkerQuestion):
                worker.answer(job_id, item.number, None)
        if not alive:
            return said
        thread.join(0.05)


def lines(items):
    return [item.text for item in items if isinstance(item, Line)]


def test_each_job_says_its_own_and_leaves_checkpoints_usage_and_a_result(tmp_path, settings):
    members = [member(tmp_path, "acme"), member(tmp_path, "globex", batch_size=4, seed=3)]
    broken = member(tmp_path, "initech")
    Path(broken.spec["data"]["train"]).write_text('{"prompt": "no answer"}\n')
    said = trained([*members, broken], settings)
    assert isinstance(said["ftjob-initech"][-1].error, DataError)
    for one, rows in zip(members, (8, 4), strict=True):
        items = said[one.job_id]
        assert items[-1] == Ended()
        assert lines(items)[0].startswith("training ")
        assert any(line.startswith("step 2/2") for line in lines(items))
        points = [item.values for item in items if isinstance(item, CurvePoint)]
        assert any("dev/loss" in point for point in points)
        assert not any(name.startswith("system/") for point in points for name in point), "of all jobs together"
        for other in ("acme", "globex", "initech"):
            assert other in one.job_id or other not in "\n".join(lines(items))
        run = Path(settings.storage) / "runs" / one.job_id
        answer = json.loads((run / "result" / "answer.json").read_text())
        assert answer["metrics"]["steps"] == 2
        assert answer["digest"]
        assert answer["unservable"] == ""
        assert sorted(path.name for path in run.glob("checkpoint_*")) == [
            "checkpoint_000000001",
            "checkpoint_000000002",
        ]
        progress = json.loads((run / "checkpoint_000000002" / "state" / "progress.json").read_text())
        assert progress["samples"] == 2 * 2 * rows, "of Ω and of Θ"
        tokens, seconds = trained_so_far(settings.storage, one.job_id)
        assert (tokens, seconds) == (progress["all_tokens"], progress["seconds"])
        assert answer["metrics"]["train_tokens"] == tokens


def test_one_that_is_stopped_ends_there_and_resumes_from_its_checkpoint_later(tmp_path, settings):
    members = [member(tmp_path, "acme"), member(tmp_path, "globex")]

    def stop(worker, job_id, item):
        if job_id == "ftjob-acme" and isinstance(item, WorkerQuestion):
            worker.stop("ftjob-acme")  # after its training: the question is its last

    worker_said = trained(members, settings, stop)
    assert worker_said["ftjob-acme"][-1] == Ended(stopped=True)
    assert not (Path(settings.storage) / "runs" / "ftjob-acme" / "result").exists()
    assert worker_said["ftjob-globex"][-1] == Ended()
    again = trained(members[:1], settings)
    assert any(line.startswith("resumed at step 2/2") for line in lines(again["ftjob-acme"]))
    assert again["ftjob-acme"][-1] == Ended()


def test_what_breaks_a_job_is_in_its_own_log_and_ends_it_for_now(tmp_path, settings, monkeypatch):
    """Alone it is raised, as by a lone worker, which is replaced then."""
    members = [member(tmp_path, "acme"), member(tmp_path, "globex")]
    save = training_worker.save

    def out_of_memory(context, trained, folder):
        if context.spec.tenant == "acme":
            raise MemoryError("no room")
        return save(context, trained, folder)

    monkeypatch.setattr(training_worker, "save", out_of_memory)
    said = trained(members, settings)
    assert isinstance(said["ftjob-acme"][-1].error, UnavailableError)
    assert any(line.endswith("MemoryError: no room") for line in lines(said["ftjob-acme"]))
    assert said["ftjob-globex"][-1] == Ended()
    assert not any("MemoryError" in line for line in lines(said["ftjob-globex"]))
    with pytest.raises(MemoryError):
        GroupWorker().train(members[:1], settings.env_of_workers())


def test_a_group_that_cannot_begin_says_so_to_each(tmp_path, settings):
    members = [member(tmp_path, "acme"), member(tmp_path, "globex")]
    for one in members:
        one.spec["backbone"] = str(tmp_path / "nowhere")
    said = trained(members, settings)
    assert all("nowhere" in items[-1].error.message for items in said.values())


class NoRay(JobGroup):
    """A group whose worker is lost `losses` times, and then says what `ends` has for each job."""

    losses, ends = 0, {}

    def _train(self, jobs):
        if self.losses:
            self.losses -= 1
            return RuntimeError("the worker died unexpectedly")
        self._pass_on(
            SimpleNamespace(answer=SimpleNamespace(remote=print)),
            [(job.member.job_id, self.ends[job.member.job_id]) for job in jobs],
        )
        return None


@pytest.fixture
def errands(monkeypatch):
    """Jobs' errands, of which there are none; gives the jobs whose waiting checkpoints were taken up."""
    taken_up = []

    def fake(_settings, _model, _run_id, job_id):
        return SimpleNamespace(do=lambda *_: None, close=lambda: None, take_up=lambda: taken_up.append(job_id))

    monkeypatch.setattr(job_group, "Errands", fake)
    return taken_up


def fitted(group, settings, members, tmp_path):
    """What `fit` gives or raises in each job's thread while the group runs."""
    ended = {}

    def fit(one):
        from pedro.training.spec import FineTuneSpec

        try:
            spec = FineTuneSpec.model_validate(one.spec)
            ended[one.job_id] = group.fit(spec, settings, "run", one.job_id, tmp_path / f"scratch-{one.job_id}")
        except BaseException as error:  # noqa: BLE001 - SystemExit too
            ended[one.job_id] = error
        finally:
            group.leave(one.job_id)

    threads = [threading.Thread(target=fit, args=(one,), daemon=True) for one in members]
    for thread in threads:
        thread.start()
    group.run()
    for thread in threads:
        thread.join()
    return ended


def test_a_driver_tells_each_of_its_jobs_how_it_ended(tmp_path, settings, errands, capsys):
    members = [member(tmp_path, name) for name in ("acme", "globex", "initech")]
    trained(members[:1], settings)  # leaves its result
    group = NoRay(settings, [*(one.job_id for one in members), "ftjob-gone"])
    group.ends = {"ftjob-globex": Ended(TrainingError("the loss is nan")), "ftjob-initech": Ended(stopped=True)}
    group.leave("ftjob-gone")
    ended = fitted(group, settings, members, tmp_path)
    assert ended["ftjob-acme"].metrics["steps"] == 2, "as of a driver before this one"
    assert (ended["ftjob-acme"].directory / "adapter_config.json").is_file()
    assert sorted(errands) == ["ftjob-acme", "ftjob-globex", "ftjob-initech"], "what such a driver may have left"
    assert str(ended["ftjob-globex"]) == "the loss is nan"
    assert isinstance(ended["ftjob-initech"], SystemExit)


def test_a_worker_that_is_lost_is_replaced_for_one_job_and_sends_several_back(tmp_path, settings, errands, capsys):
    members = [member(tmp_path, name) for name in ("acme", "globex")]
    group = NoRay(settings, [one.job_id for one in members])
    group.losses = 1
    ended = fitted(group, settings, members, tmp_path)
    assert all(isinstance(error, UnavailableError) for error in ended.values()), "each is started again, alone"

    group = NoRay(settings, [members[0].job_id])
    group.losses, group.ends = 1, {"ftjob-acme": Ended(stopped=True)}
    ended = fitted(group, settings, members[:1], tmp_path)
    assert isinstance(ended["ftjob-acme"], SystemExit)
    assert "replaced, 1 of at most 3 times" in capsys.readouterr().out

    group = NoRay(settings, [members[0].job_id])
    group.losses = 4
    ended = fitted(group, settings, members[:1], tmp_path)
    assert "more than 3 times" in str(ended["ftjob-acme"])


def test_a_driver_that_ends_leaves_its_jobs(tmp_path, settings, errands):
    members = [member(tmp_path, name) for name in ("acme", "globex")]
    group = NoRay(settings, [one.job_id for one in members])
    group._train = lambda jobs: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted(group, settings, members, tmp_path)


def queued(settings, tenant="acme"):
    """A job that a shared driver works on."""
    store = Store(settings.database_url)
    job = store.create_job(tenant, "voice", {"resources": {"share": True}}, queued=True)
    store.update_job(job.id, submission_id="shared-x", attempt=1)
    store.update_job(job.id, status=JobStatus.RUNNING, attempt=1)
    return store, job.id


def test_a_job_that_is_to_end_makes_no_version_though_its_result_is_there(tmp_path, settings, errands):
    store, job_id = queued(settings)
    one = dataclasses.replace(member(tmp_path, "acme"), job_id=job_id)
    trained([one], settings)
    store.ask_of_job(job_id, JobStatus.PAUSED)
    group = NoRay(settings, [job_id])
    assert isinstance(fitted(group, settings, [one], tmp_path)[job_id], SystemExit)
    assert errands == []
    gone = JobOfGroup(Member("ftjob-erased", {}, None), None)
    wanted = JobOfGroup(Member(job_id, {}, None), None)
    goes_on = JobOfGroup(Member(queued(settings)[1], {}, None), None)
    assert group._unwanted([gone, wanted, goes_on]) == [gone, wanted]
    store.close()


def test_a_job_that_did_not_come_to_rest_is_left_to_the_controller(settings, monkeypatch):
    store, job_id = queued(settings)
    group = NoRay(settings, [job_id])
    monkeypatch.setattr(group_driver, "drive_job", lambda *arguments: 1)
    group_driver._drive(settings, group, job_id, 1, {})
    assert store.get_job(job_id).submission_id == "shared-x-left", "a driver that there is not"
    store.update_job(job_id, status=JobStatus.SUCCEEDED, submission_id="shared-x", attempt=1)
    group_driver._drive(settings, group, job_id, 1, {})
    assert store.get_job(job_id).submission_id == "shared-x"
    store.close()


def test_what_is_half_written_lies_in_the_runs_own_folder_and_is_no_checkpoint(tmp_path, monkeypatch):
    run, made = tmp_path / "runs" / "ftjob-1", tmp_path / "made"
    (made / "state").mkdir(parents=True)
    seen = []

    def copied(source, target, *rest, **options):
        seen.append(Path(target).relative_to(run).parts)
        assert CotrainingReporter(str(run), None, None)._kept() == []
        return copytree(source, target, *rest, **options)

    copytree = shutil.copytree
    monkeypatch.setattr(shutil, "copytree", copied)
    put_folder(made, str(run / "checkpoint_000000001"))
    assert seen[0][0].startswith(".new-")
    assert [path.name for path in run.iterdir()] == ["checkpoint_000000001"]
    assert [path.name for path in run.parent.iterdir()] == ["ftjob-1"]


def test_behind_a_jobs_end_nothing_reaches_it(settings):
    group = NoRay(settings, [])
    job = JobOfGroup(Member("ftjob-1", {}, None), None)
    for item in (Line("a"), Ended(), Line("b"), Ended(stopped=True)):
        group._hand(job, (item, lambda _number, _answer: None))
    assert [job.inbox.get()[0] for _ in range(job.inbox.qsize())] == [Line("a"), Ended()]


def test_what_a_jobs_thread_prints_is_kept_in_its_own_log_alone(tmp_path, capsys):
    storage, both = str(tmp_path), threading.Barrier(2)

    def drive(job_id):
        with keeping_log_of_thread(storage, job_id):
            both.wait()
            beside = Background("prints")
            beside.do(lambda: print(f"line of {job_id}"))
            beside.close(10)
            print(f"error of {job_id}", file=sys.stderr)
            both.wait()

    with by_thread():
        threads = [threading.Thread(target=drive, args=(f"ftjob-{name}",)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("of none")
    assert kept_log(storage, "ftjob-a") == "line of ftjob-a\nerror of ftjob-a\n"
    assert kept_log(storage, "ftjob-b") == "line of ftjob-b\nerror of ftjob-b\n"
    assert capsys.readouterr().out == "of none\n"
