"""Where a run's news and checkpoints go without a cluster, and the run's curves in any case."""

from __future__ import annotations

import logging
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pedro.training.checkpoints import read_checkpoint, write_checkpoint
from pedro.training.engines import StepEngine
from pedro.training.loop import TrainState
from pedro.training.worker_group import WorkerGroup

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


class LocalReporter:
    """Checkpoints in a folder of this host, lines to `log`."""

    def __init__(self, directory: Path, log: Callable[[str], None] = print, curves: CurveWriter | None = None) -> None:
        self.directory, self.log, self.curves = directory, log, curves

    def resume(self, engine: StepEngine, group: WorkerGroup) -> tuple[TrainState, Mapping[str, torch.Tensor]] | None:
        last = self.directory / "last"
        return read_checkpoint(last, engine, group) if last.is_dir() else None

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        making, last = self.directory / "making", self.directory / "last"
        write_checkpoint(making, engine, group, state, best)
        if group.rank == 0:
            shutil.rmtree(last, ignore_errors=True)
            making.rename(last)
        group.gather(None)  # nobody writes into `making` before it has been moved

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if self.curves:
            self.curves.add(step, values)

    def line(self, text: str) -> None:
        self.log(text)


def system_metrics() -> dict[str, float]:
    """What this process takes of the machine: resident memory, processor use since the last call, peak GPU memory."""
    process = _this_process()
    values = {
        "system/memory_mb": process.memory_info().rss / 2**20,
        "system/cpu_percent": process.cpu_percent(None),
    }
    if torch.cuda.is_available():
        values["system/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return values


@cache
def _this_process() -> Any:
    import psutil

    return psutil.Process()
