"""Jobs that wait for one another where the backbone is read, so that one pass serves all of them. torch only.

Every job is a loop on a thread of its own, but only one runs at a time: the coordinator lets each continue until it
asks for something (logits, gradients), and once all of them have asked it answers all at once. So a job need not know
that it is not alone, and what threads do is as ordered as if there were one. Of jobs it sees only what they ask for.
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
    """A forward pass: a slice of a batch, and the positions [B, T] whose logits are wanted."""

    positions: torch.Tensor
    batch: Mapping[str, torch.Tensor]
    learning: bool
    """Whether gradients are to flow back."""


@dataclass(frozen=True)
class Learning:
    """A backward pass from this loss."""

    loss: torch.Tensor


AWAY = object()
"""Asked by who waits for something else than a pass."""


class Passes(Protocol):
    """What the coordinator needs of the stacked model."""

    def read(self, parts: Sequence[tuple[int, Reading]]) -> list[torch.Tensor]:
        """The logits of each part, a participant's number and what it reads, in one pass."""


class Stopped(TrainingError):
    """The job was asked to end; the others go on."""


class Participant:
    """One job among those that share passes. Its thread calls `ask` and `away`; `stop` may be called from any."""

    def __init__(self, number: int, work: Callable[[Participant], None], back: queue.SimpleQueue[Participant]) -> None:
        self.number = number
        self.seconds = 0.0
        """Of the worker that this job has had: its own work, and its rows' share of common passes."""
        self.asked: Any = None
        self.ended = False
        self.error: BaseException | None = None
        """What its work raised."""
        self._work, self._back = work, back
        self._answer: Any = None
        self._stop = False
        self._turn, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"participant {number}", daemon=True)
        self._thread.start()

    def ask(self, what: Reading | Learning) -> Any:
        """Wait for the coordinator's answer. Raises what went wrong with it, and Stopped."""
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
        """Within it the others do not wait for this job, which must not touch what they share. Raises Stopped at its
        end."""
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
        """Have the job end where it next asks for something."""
        self._stop = True

    def go_on(self, answer: Any) -> None:
        """For the coordinator: let the job run until it asks for something, or has ended."""
        started = time.monotonic()
        self._answer = answer
        self._turn.release()
        self._parked.acquire()
        self.seconds += time.monotonic() - started

    def heed(self) -> None:
        """Raise Stopped if the job was asked to end."""
        if self._stop:
            raise Stopped("the job was stopped")

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self._work(self)
        except BaseException as error:  # noqa: BLE001 - it ends this job, and no other
            self.error = error
        finally:
            self.asked, self.ended = None, True
            self._parked.release()


class PassCoordinator:
    """Starts jobs, and answers what they ask."""

    def __init__(self, passes: Passes, works: Sequence[Callable[[Participant], None]]) -> None:
        self._passes = passes
        self._back: queue.SimpleQueue[Participant] = queue.SimpleQueue()
        self.participants = [Participant(number, work, self._back) for number, work in enumerate(works)]

    def run(self) -> None:
        """Return when every job has ended; what one raised is its participant's `error`."""
        for participant in self.participants:
            participant.go_on(None)
        while left := [participant for participant in self.participants if not participant.ended]:
            waiting = [participant for participant in left if participant.asked is not AWAY]
            if waiting and self._back.empty():
                self._serve(waiting)
            else:
                self._back.get().go_on(None)

    def _serve(self, waiting: Sequence[Participant]) -> None:
        """Answer all that wait. Gradients first: then nobody asks for any but of the last pass."""
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
            except Exception as error:  # noqa: BLE001 - whatever one job's rows do to the pass
                if len(participants) == 1:
                    return [(participants[0], error)]
        # here, where the error's traceback holds none of the pass's memory any more
        return [answer for participant in participants for answer in self._read([participant], learning)]

    def _learn(self, participants: Sequence[Participant]) -> list[tuple[Participant, Any]]:
        answer: Exception | None = None
        with _shared_time(participants):
            try:
                torch.autograd.backward([participant.asked.loss for participant in participants])
            except Exception as error:  # noqa: BLE001 - told to each: a graph is walked only once
                answer = error
        return [(participant, answer) for participant in participants]


@contextmanager
def _shared_time(participants: Sequence[Participant]) -> Iterator[None]:
    started = time.monotonic()
    yield
    took = (time.monotonic() - started) / len(participants)
    for participant in participants:
        participant.seconds += took
