"""Ray Train's controller beside the driver's own thread, which must hear that the job is to end."""

import signal
import threading

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import WorkerGroupError

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
