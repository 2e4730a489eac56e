"""The curves of a run: points sent to the tracking server, with what the process takes of the machine."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from pedro.process import peak_memory

LOG = logging.getLogger(__name__)
LogPoint = Callable[[int, Mapping[str, float]], None]
FLUSH_TIMEOUT_S = 60


class CurveWriter:
    """Sends the points of a run's curves from a thread of its own: a slow tracking server never slows training.

    `connect` is called once, on that thread, and returns what takes (step, metrics). A point that cannot be sent is
    dropped with a warning: curves are worth less than the training.
    """

    def __init__(self, connect: Callable[[], LogPoint]) -> None:
        self._points: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send, args=(connect,), name="curves", daemon=True)
        self._thread.start()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Queue one point of several curves, with what the process takes of the machine by now."""
        self._points.put((step, {**values, **system_metrics()}))

    def close(self) -> None:
        """Send what is queued, at most for a minute."""
        self._points.put(None)
        self._thread.join(FLUSH_TIMEOUT_S)

    def _send(self, connect: Callable[[], LogPoint]) -> None:
        log: LogPoint | None = None
        while (point := self._points.get()) is not None:
            try:
                log = log or connect()
                log(*point)
            except Exception as error:  # noqa: BLE001 - whatever the tracking server's client raises
                LOG.warning("a point of the curves at step %d is lost: %s", point[0], error)


def system_metrics() -> dict[str, float]:
    """What this process takes of the machine: resident memory and its peak, processor use since the last call, and the
    peak of GPU memory.
    """
    process = _this_process()
    values = {
        "system/memory_mb": process.memory_info().rss / 2**20,
        "system/peak_memory_mb": peak_memory() / 2**20,
        "system/cpu_percent": process.cpu_percent(None),
    }
    if torch.cuda.is_available():
        values["system/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return values


@cache
def _this_process() -> Any:
    import psutil

    return psutil.Process()
