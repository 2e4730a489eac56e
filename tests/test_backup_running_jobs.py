"""A backup beside a job that writes checkpoints is one that the job resumes from, says Ray Train's manager of them."""

from __future__ import annotations

import asyncio
import itertools
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray.train
from backup_homes import back_up, files_of, restore, settings_of
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport

from pedro.backup import running_jobs
from pedro.errors import UnavailableError
from pedro.store import Store

PARTS = 12  # files of one checkpoint


def run_of(settings, job_id: str) -> tuple[CheckpointManager, Path]:
    """Ray Train's bookkeeping of a run, as a job's driver has it, and the run's folder."""
    runs = Path(settings.storage) / "runs"
    context = StorageContext(str(runs), job_id)
    return CheckpointManager(ray.train.CheckpointConfig(num_to_keep=2), context), runs / job_id


def checkpoint(folder: Path, step: int) -> ray.train.Checkpoint:
    """One whose files all say of which step they are."""
    directory = folder / f"checkpoint_{step:06}"
    directory.mkdir()
    for part in range(PARTS):
        (directory / f"rank{part}.safetensors").write_text(str(step))
    return ray.train.Checkpoint(str(directory))


@contextmanager
def writing(settings, job_id: str):
    """A run that writes many checkpoints a second."""
    manager, folder = run_of(settings, job_id)
    stop, written = threading.Event(), threading.Event()

    async def write():
        for step in itertools.count(1):
            made = checkpoint(folder, step)
            manager.register_checkpoint(_TrainingReport(made, {"step": step}, False))
            await asyncio.sleep(0.1)
            if step == 3:
                written.set()
            if stop.is_set():
                return

    thread = threading.Thread(target=lambda: asyncio.run(write()))
    thread.start()
    try:
        assert written.wait(60)
        yield folder
    finally:
        stop.set()
        thread.join(60)


@pytest.fixture
def home(tmp_path):
    """A home with a job that has not ended."""
    settings = settings_of(tmp_path / "home")
    store = Store(settings.database_url)
    job = store.create_job("acme", "support", {"tenant": "acme"})
    store.update_job(job.id, status="running", submission_id=job.id)
    store.close()
    return settings, job.id


def test_a_backup_beside_a_job_that_writes_checkpoints_has_whole_ones_that_it_is_resumed_from(home, tmp_path):
    settings, job_id = home
    with writing(settings, job_id):
        archives = [back_up(settings, tmp_path / f"{number}.tar.gz") for number in range(5)]
    steps = []
    for number, archive in enumerate(archives):
        restored = settings_of(tmp_path / f"restored-{number}")
        restore(restored, archive)
        manager, folder = run_of(restored, job_id)  # raises for a record whose checkpoints are not all there
        latest = manager.latest_checkpoint_result
        assert Path(latest.checkpoint.path).parent == folder
        said = files_of(Path(latest.checkpoint.path))
        assert list(said.values()) == [str(latest.metrics["step"]).encode()] * PARTS
        assert len([path for path in folder.iterdir() if path.is_dir()]) == 2, "none that is half written"
        steps.append(latest.metrics["step"])
    assert steps == sorted(steps)
    assert steps[0] < steps[-1], "it wrote meanwhile"


def test_a_run_that_cannot_be_had_as_of_one_moment_is_refused_and_no_backup_is_left(home, tmp_path, monkeypatch):
    settings, job_id = home
    manager, folder = run_of(settings, job_id)

    async def write():
        manager.register_checkpoint(_TrainingReport(checkpoint(folder, 1), {"step": 1}, False))

    asyncio.run(write())
    (folder / "checkpoint_000001" / "rank0.safetensors").unlink()
    (folder / "checkpoint_000001").rename(folder / "gone")  # the record names what is not there
    monkeypatch.setattr(running_jobs, "TRIES", 2)
    with pytest.raises(UnavailableError, match=f"pedro jobs pause {job_id}"):
        back_up(settings, tmp_path / "backup.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
