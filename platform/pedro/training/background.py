"""A thread that does one task after the other, so that the caller need not wait."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from pedro.training.job_log import LOGS

LOG = logging.getLogger(__name__)


class Background:
    """The thread. A task that fails is told in the log; the next ones are done all the same. What they print goes where
    it goes in the thread that made it."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._log: Any = getattr(LOGS, "log", None)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, task: Callable[[], None]) -> None:
        """Queue a task."""
        self._tasks.put(task)

    def close(self, within_s: float) -> None:
        """Do what is queued, at most for so long."""
        self._tasks.put(None)
        self._thread.join(within_s)

    def _run(self) -> None:
        LOGS.log = self._log
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:  # noqa: BLE001 - whatever the tracking server's client raises
                LOG.warning("%s: %s", self._thread.name, error)
