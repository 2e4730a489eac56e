"""Synchronises jobs before each pass over the backbone, so that one pass serves all of them. torch only.

Every job is a loop on its own thread, but only one thread runs at a time: the coordinator lets each continue until it
requests something (logits, gradients), and answers all requests together once all jobs have made one. So a job's code
does not depend on the others, and execution is as deterministic as on a single thread. The coordinator only sees the
jobs' requests.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pedro.errors import TrainingError


@dataclass(frozen=True)
class Reading:
    """A forward pass: a slice of a batch, and the positions [B, T] whose logits are needed."""

    positions: torch.Tensor
    batch: Mapping[str, torch.Tensor]
    learning: bool
    """Whether gradients are needed."""


@dataclass(frozen=True)
class Learning:
    """A backward pass from this loss."""

    loss: torch.Tensor


AWAY = object()
"""The request of a job that waits for something other than a pass."""


class Passes(Protocol):
    """The coordinator's interface to the stacked model."""

    def read(self, parts: Sequence[tuple[int, Reading]]) -> list[torch.Tensor]:
        """The logits of each part (a participant's number and its request), in one pass."""


class Stopped(TrainingError):
    """The job was asked to stop; the others continue."""


class Participant:
    """One job among those that share passes. Its thread calls `ask` and `away`; `stop` may be called from any."""

    def __init__(self, number: int, work: Callable[[Participant], None], back: queue.SimpleQueue[Participant]) -> None:
        self.number = number
        self.seconds = 0.0
        """Worker time used by this job: its own work, and its rows' share of common passes."""
        self.asked: Any = None
        self.ended = False
        self.error: BaseException | None = None
        """The error that its work raised."""
        self._work, self._back = work, back
        self._answer: Any = None
        self._stop = False
        self._turn, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"participant {number}", daemon=True)
        self._thread.start()

    def ask(self, what: Reading | Learning) -> Any:
        """Wait for the coordinator's answer. Raises its error, or Stopped."""
        self.heed()
        self.asked = what
        self._parked.release()
        self._turn.acquire()
        answer, self._answer, self.asked = self._answer, None, None
        self.heed()
        if isinstance(answer, Exception):
            raise answer
        return answer

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within this context the others do not wait for this job, which must not touch shared state. Raises Stopped at
        the end."""
        self.asked = AWAY
        self._parked.release()
        try:
            yield
        finally:
            self._back.put(self)
            self._turn.acquire()
            self.asked = None
        self.heed()

    def stop(self) -> None:
        """Stop the job at its next request."""
        self._stop = True

    def go_on(self, answer: Any) -> None:
        """For the coordinator: let the job run until its next request or its end."""
        started = time.monotonic()
        self._answer = answer
        self._turn.release()
        self._parked.acquire()
        self.seconds += time.monotonic() - started

    def heed(self) -> None:
        """Raise Stopped if the job was asked to stop."""
        if self._stop:
            raise Stopped("the job was stopped")

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self._work(self)
        except BaseException as error:  # noqa: BLE001 - ends this job only
            self.error = error
        finally:
            self.asked, self.ended = None, True
            self._parked.release()


class PassCoordinator:
    """Starts jobs and answers their requests."""

    def __init__(self, passes: Passes, works: Sequence[Callable[[Participant], None]]) -> None:
        self._passes = passes
        self._back: queue.SimpleQueue[Participant] = queue.SimpleQueue()
        self.participants = [Participant(number, work, self._back) for number, work in enumerate(works)]

    def run(self) -> None:
        """Return when every job has ended; errors are in their participants' `error`."""
        for participant in self.participants:
            participant.go_on(None)
        while left := [participant for participant in self.participants if not participant.ended]:
            waiting = [participant for participant in left if participant.asked is not AWAY]
            if waiting and self._back.empty():
                self._serve(waiting)
            else:
                self._back.get().go_on(None)

    def _serve(self, waiting: Sequence[Participant]) -> None:
        """Answer all waiting jobs. Gradients first, so that they always belong to the last pass."""
        if losses := [participant for participant in waiting if isinstance(participant.asked, Learning)]:
            answers = self._learn(losses)
        else:
            answers = []
            for learning in (True, False):
                answers += self._read(
                    [participant for participant in waiting if participant.asked.learning is learning], learning
                )
        for participant, answer in answers:
            participant.go_on(answer)

    def _read(self, participants: Sequence[Participant], learning: bool) -> list[tuple[Participant, Any]]:
        if not participants:
            return []
        with _shared_time(participants), torch.set_grad_enabled(learning):
            try:
                logits: list[Any] = self._passes.read(
                    [(participant.number, participant.asked) for participant in participants]
                )
                return list(zip(participants, logits, strict=True))
            except Exception as error:  # noqa: BLE001 - any error that one job's rows cause
                if len(participants) == 1:
                    return [(participants[0], error)]
        # here, where the error's traceback no longer references the pass's memory
        return [answer for participant in participants for answer in self._read([participant], learning)]

    def _learn(self, participants: Sequence[Participant]) -> list[tuple[Participant, Any]]:
        answer: Exception | None = None
        with _shared_time(participants):
            try:
                torch.autograd.backward([participant.asked.loss for participant in participants])
            except Exception as error:  # noqa: BLE001 - fails each: a graph can be used only once
                answer = error
        return [(participant, answer) for participant in participants]


@contextmanager
def _shared_time(participants: Sequence[Participant]) -> Iterator[None]:
    started = time.monotonic()
    yield
    took = (time.monotonic() - started) / len(participants)
    for participant in participants:
        participant.seconds += took
