"""What a worker has for its job's driver: points of the run's curves, and questions.

A worker holds nothing that opens the platform (`Settings.env_of_workers`), so it writes to neither MLflow nor the
database. The driver looks into the outbox of the first worker, and answers, by calls that Ray runs in its process.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MODEL = "model"
"""Of a checkpoint's report: what is told of it where it is to become a version."""
THE_CHAMPION = "champion"
"""To ask for."""
AGAIN_S = 30.0
"""So long after a question it is asked again: it or its answer may have been lost on the way."""


@dataclass(frozen=True)
class CurvePoint:
    """Of several curves, at one step."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class WorkerQuestion:
    """What the worker waits for."""

    number: int
    about: str


class Outbox:
    """One worker's. Thread-safe: it trains on one thread, Ray's calls come on another."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked: list[Future[Any]] = []

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """Leave a point for the driver."""
        self._items.put(CurvePoint(step, dict(values)))

    def put(self, item: Any) -> None:
        """Leave anything else for it."""
        self._items.put(item)

    def ask(self, about: str) -> Any:
        """Wait for the driver's answer. Raises the PedroError that it met."""
        answer: Future[Any] = Future()
        self._asked.append(answer)
        question = WorkerQuestion(len(self._asked) - 1, about)
        self._items.put(question)
        while not wait([answer], AGAIN_S).done:
            self._items.put(question)
        return answer.result()

    def take(self) -> list[CurvePoint | WorkerQuestion]:
        """What was left since the last call."""
        taken = []
        with suppress(queue.Empty):
            while True:
                taken.append(self._items.get_nowait())
        return taken

    def answer(self, number: int, value: Any) -> None:
        """Answer a question, with an error if that is what `value` is. A second answer is dropped."""
        with suppress(InvalidStateError):
            if isinstance(value, Exception):
                self._asked[number].set_exception(value)
            else:
                self._asked[number].set_result(value)


OUTBOX = Outbox()
"""Of this process, which is one worker."""


def take() -> list[CurvePoint | WorkerQuestion]:
    """`Outbox.take`, as Ray calls it."""
    return OUTBOX.take()


def answer(number: int, value: Any) -> None:
    """`Outbox.answer`, as Ray calls it."""
    OUTBOX.answer(number, value)
