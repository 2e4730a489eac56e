"""Ray Train's trainer without the helper processes that a fine-tune has no use for.

Ray Train starts several actors beside the workers, each a process that imports Ray and PyTorch before the first step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray import runtime_context
from ray.train.torch import TorchTrainer

# By name: they are Ray's own, and one that another version no longer has is simply not found.
DATASETS = "DatasetsCallback"  # hands out shards of Ray Data's datasets, of which we give none
CLEANER = "PlacementGroupCleanerCallback"  # frees the workers' CPUs if the controller dies and its job lives on


class LeanTorchTrainer(TorchTrainer):
    """Starts one process less, and three less where no trial of a sweep is trained.

    A job ends with its controller, and with it what its workers hold; a sweep goes on to its other trials.
    """

    def __init__(self, *arguments: Any, errands: Any = None, **options: Any) -> None:
        """`errands` is a callback for the controller alone: those of the `run_config` are sent to the workers, too."""
        super().__init__(*arguments, **options)
        self._errands = [errands] if errands is not None else []

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # only version 2 of Ray Train has it
        unused = {DATASETS} if _in_sweep() else {DATASETS, CLEANER}
        return [callback for callback in made if type(callback).__name__ not in unused] + self._errands

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        """Ray's controller runs in the job's driver, which has nothing else to do, instead of as an actor."""
        if _in_sweep():  # whose trial is told of each report by this process, while it waits
            return super()._initialize_and_run_controller(**options)  # type: ignore[misc]
        from ray.train.v2._internal.execution.controller import TrainController

        ray_context: Any = runtime_context
        drivers_context: Any = _DriversContext
        ray_context._runtime_context = drivers_context(runtime_context.get_runtime_context().worker)
        controller = TrainController(**options)
        for handler in logging.getLogger("ray.train").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setFormatter(_OfAnActor())
        _beside_signals(lambda: asyncio.run(controller.run()))
        return controller.get_result()


def _beside_signals(work: Callable[[], None]) -> None:
    """Do it on a thread: this one stays free to be stopped, which a call into Ray would not let it be."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised where it is waited for)
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, name="train controller", daemon=True).start()
    ended.result()


class _DriversContext(runtime_context.RuntimeContext):
    """The controller hands its own actor to the workers, who would ask it for checkpoints; ours ask for none."""

    current_actor: Any = None


class _OfAnActor(logging.Formatter):
    """Marks the controller's own lines as Ray marks an actor's, so that only who wants all of a log reads them."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"(TrainController pid={os.getpid()}) "
        return "\n".join(mark + line for line in super().format(record).splitlines())


def _in_sweep() -> bool:
    """Whether this process is a trial that Ray Tune started."""
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    return bool(_in_tune_session())
