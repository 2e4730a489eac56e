"""Jobs that wait for one another where the backbone is read, so that one pass serves all of them. torch only.

Every job is a loop on a thread of its own, but only one runs at a time: the table lets each go on until it asks for
something (logits, gradients), and when all of them have asked it answers all at once. So a job need not know that it
is not alone, and what a thread does is as ordered as if there were none. Knows nothing of jobs but what they ask.
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
"""Asked by who waits for something else than the table."""


class Passes(Protocol):
    """What the table needs of the carrier."""

    def read(self, parts: Sequence[tuple[int, Reading]]) -> list[torch.Tensor]:
        """The logits of each part, a seat's number and what it reads, in one pass."""


class Stopped(TrainingError):
    """The job was asked to end; the others go on."""


class Seat:
    """One job at the table. Its thread calls `ask` and `away`; `stop` may be called from any."""

    def __init__(self, number: int, work: Callable[[Seat], None], back: queue.SimpleQueue[Seat]) -> None:
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
        self._thread = threading.Thread(target=self._run, name=f"seat {number}", daemon=True)
        self._thread.start()

    def ask(self, what: Reading | Learning) -> Any:
        """Wait for the table's answer. Raises what went wrong with it, and Stopped."""
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
        """For the table: let the job run until it asks for something, or has ended."""
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


class RoundTable:
    """Seats jobs and answers them."""

    def __init__(self, passes: Passes, works: Sequence[Callable[[Seat], None]]) -> None:
        self._passes = passes
        self._back: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        self.seats = [Seat(number, work, self._back) for number, work in enumerate(works)]

    def run(self) -> None:
        """Return when every job has ended; what one raised is its seat's `error`."""
        for seat in self.seats:
            seat.go_on(None)
        while left := [seat for seat in self.seats if not seat.ended]:
            waiting = [seat for seat in left if seat.asked is not AWAY]
            if waiting and self._back.empty():
                self._serve(waiting)
            else:
                self._back.get().go_on(None)

    def _serve(self, waiting: Sequence[Seat]) -> None:
        """Answer all that wait. Gradients first: then nobody asks for any but of the last pass."""
        if losses := [seat for seat in waiting if isinstance(seat.asked, Learning)]:
            answers = self._learn(losses)
        else:
            answers = []
            for learning in (True, False):
                answers += self._read([seat for seat in waiting if seat.asked.learning is learning], learning)
        for seat, answer in answers:
            seat.go_on(answer)

    def _read(self, seats: Sequence[Seat], learning: bool) -> list[tuple[Seat, Any]]:
        if not seats:
            return []
        with _shared_time(seats), torch.set_grad_enabled(learning):
            try:
                logits: list[Any] = self._passes.read([(seat.number, seat.asked) for seat in seats])
                return list(zip(seats, logits, strict=True))
            except Exception as error:  # noqa: BLE001 - whatever one job's rows do to the pass
                if len(seats) == 1:
                    return [(seats[0], error)]
        # here, where the error's traceback holds none of the pass's memory any more
        return [answer for seat in seats for answer in self._read([seat], learning)]

    def _learn(self, seats: Sequence[Seat]) -> list[tuple[Seat, Any]]:
        answer: Exception | None = None
        with _shared_time(seats):
            try:
                torch.autograd.backward([seat.asked.loss for seat in seats])
            except Exception as error:  # noqa: BLE001 - told to each: a graph is walked only once
                answer = error
        return [(seat, answer) for seat in seats]


@contextmanager
def _shared_time(seats: Sequence[Seat]) -> Iterator[None]:
    started = time.monotonic()
    yield
    took = (time.monotonic() - started) / len(seats)
    for seat in seats:
        seat.seconds += took
