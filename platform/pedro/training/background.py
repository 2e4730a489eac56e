"""A background thread that runs tasks in order, without blocking the caller."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from pedro.training.job_log import LOGS

LOG = logging.getLogger(__name__)


class Background:
    """The thread. A failed task is logged; later ones still run. Their output goes to the same log as that of the
    thread that created it."""

    def __init__(self, name: str) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._log: Any = getattr(LOGS, "log", None)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def do(self, task: Callable[[], None]) -> None:
        """Queue a task."""
        self._tasks.put(task)

    def close(self, within_s: float) -> None:
        """Finish queued tasks, up to a time limit."""
        self._tasks.put(None)
        self._thread.join(within_s)

    def _run(self) -> None:
        LOGS.log = self._log
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:  # noqa: BLE001 - any error of the tracking client
                LOG.warning("%s: %s", self._thread.name, error)
