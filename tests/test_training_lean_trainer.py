"""Ray Train's controller beside the driver's own thread, which must hear that the job is to end."""

import signal
import threading

import pytest

from pedro.training.lean_trainer import _beside_signals


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
