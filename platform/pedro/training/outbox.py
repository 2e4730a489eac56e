"""A worker's messages to its job's driver: points of the run's curves, and questions.

A worker has no credentials of the platform (`Settings.env_of_workers`), so it writes to neither MLflow nor the
database. The driver polls the outbox of the first worker, and answers, through calls that Ray runs in the worker's
process.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MODEL = "model"
"""Key in a checkpoint's report: its data if it should become a version."""
THE_CHAMPION = "champion"
"""To ask for."""
AGAIN_S = 30.0
"""When a question is repeated, since it or its answer may have been lost."""


@dataclass(frozen=True)
class CurvePoint:
    """Values of several curves at one step."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class WorkerQuestion:
    """A question for which the worker waits."""

    number: int
    about: str


class Outbox:
    """One worker's outbox. Thread-safe: training uses one thread, Ray's calls another."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked: list[Future[Any]] = []

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point for the driver."""
        self._items.put(CurvePoint(step, dict(values)))

    def put(self, item: Any) -> None:
        """Add any other message."""
        self._items.put(item)

    def ask(self, about: str) -> Any:
        """Wait for the driver's answer. Raises its PedroError."""
        answer: Future[Any] = Future()
        self._asked.append(answer)
        question = WorkerQuestion(len(self._asked) - 1, about)
        self._items.put(question)
        while not wait([answer], AGAIN_S).done:
            self._items.put(question)
        return answer.result()

    def take(self) -> list[CurvePoint | WorkerQuestion]:
        """The messages since the last call."""
        taken = []
        with suppress(queue.Empty):
            while True:
                taken.append(self._items.get_nowait())
        return taken

    def answer(self, number: int, value: Any) -> None:
        """Answer a question, with an error if `value` is one. A second answer is ignored."""
        with suppress(InvalidStateError):
            if isinstance(value, Exception):
                self._asked[number].set_exception(value)
            else:
                self._asked[number].set_result(value)


OUTBOX = Outbox()
"""The outbox of this process, which is one worker."""


def take() -> list[CurvePoint | WorkerQuestion]:
    """`Outbox.take`, called by Ray."""
    return OUTBOX.take()


def answer(number: int, value: Any) -> None:
    """`Outbox.answer`, called by Ray."""
    OUTBOX.answer(number, value)
