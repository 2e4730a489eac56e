"""Ray Train's controller beside the driver's own thread, which must hear that the job is to end."""

import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.air.config import CheckpointConfig
from ray.exceptions import ActorDiedError
from ray.train._internal.session import _TrainingResult
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from pedro.training.kept_checkpoints import mend_list
from pedro.training.lean_trainer import _beside_signals, _controller
from pedro.training.lost_workers import TellLosses


class StoppedError(Exception):
    """Raised by a handler, as a driver's is on SIGTERM."""


def test_what_the_controller_raises_is_raised_where_it_is_waited_for():
    def broken() -> None:
        raise KeyError("workers")

    with pytest.raises(KeyError, match="workers"):
        _beside_signals(broken)
    done = threading.Event()
    _beside_signals(done.set)
    assert done.is_set()


def test_a_signal_is_heard_while_the_controller_waits_for_room():
    def stop(*_: object) -> None:
        raise StoppedError

    before = signal.signal(signal.SIGALRM, stop)

    def waiting() -> None:
        ended.wait(60)

    ended = threading.Event()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(StoppedError):
            _beside_signals(waiting)
    finally:
        ended.set()
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("set_up", [True, False])
def test_a_worker_that_is_lost_while_its_group_starts_is_replaced_as_often_as_any_other(set_up, monkeypatch, capsys):
    def start(group: WorkerGroup, builder: object) -> None:
        if set_up:  # where Ray's own gives up
            group._worker_group_state = builder
            raise ActorDiedError
        raise WorkerGroupStartupFailedError("not set up") from ActorDiedError()  # where it tries again for ever

    monkeypatch.setattr(WorkerGroup, "_start_impl", start)
    group = object.__new__(_controller(TellLosses(1).tell).worker_group_cls)
    group._worker_group_state, group._world_rank_to_ongoing_poll = None, {}
    policy, decisions = DefaultFailurePolicy(FailureConfig(max_failures=1)), []
    for _ in range(2):
        with pytest.raises(WorkerGroupError) as lost:
            group._start()
        assert not group.has_started(), "Ray has freed what there was of it"
        decisions.append(policy.make_decision(lost.value))
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("worker 0 was lost (The actor died unexpectedly")
    assert "replaced, 1 of at most 1" in first
    assert second.endswith("no more are replaced")


@pytest.mark.parametrize("damage", ["nothing of it", "a part of it", "a checkpoint that is gone", "no list"])
def test_a_list_of_checkpoints_that_a_kill_left_in_part_is_made_anew(tmp_path, damage):
    storage = StorageContext(str(tmp_path), "ftjob-1")
    run: Any = SimpleNamespace(checkpoint_config=CheckpointConfig(num_to_keep=2), storage_context=storage)
    manager: Any = CheckpointManager(run.checkpoint_config, storage)
    for step in range(3):  # the third is uploaded, and not yet reported
        folder = tmp_path / "ftjob-1" / f"checkpoint_2026-11-30_12-47-3{step}"
        folder.mkdir()
        if step < 2:
            kept = ray.train.Checkpoint(str(folder), storage.storage_filesystem)
            manager._checkpoint_results.append(_TrainingResult(kept, {"step": step}))
            manager._checkpoint_to_report_index[kept] = step
            manager._latest_checkpoint_result = manager._checkpoint_results[-1]
    manager._write_state_to_storage()
    listed = Path(storage.checkpoint_manager_snapshot_path)
    assert not mend_list(run), "a good list is left alone"
    if damage == "a checkpoint that is gone":
        folder.with_name("checkpoint_2026-11-30_12-47-30").rmdir()
    elif damage == "no list":
        listed.unlink()
    else:
        listed.write_bytes(listed.read_bytes()[: 0 if damage == "nothing of it" else 200])
    assert mend_list(run) == (damage != "no list"), "a new run has none"
    anew: Any = CheckpointManager(run.checkpoint_config, storage)
    if damage == "no list":
        assert anew.latest_checkpoint_result is None
        return
    assert anew.latest_checkpoint_result.checkpoint.path == str(folder)
    assert len(anew._checkpoint_results) == (2 if damage == "a checkpoint that is gone" else 3), (
        "so old ones are deleted"
    )
    assert not mend_list(run)
