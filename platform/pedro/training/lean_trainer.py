"""Ray Train's trainer without helper processes that a fine-tune does not need.

Ray Train starts several actors besides the workers, each a process that imports Ray and PyTorch before the first step.
And a worker that is lost while its group starts counts as any other does; with Ray's own it ends the training.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ray import runtime_context
from ray.train.torch import TorchTrainer

from pedro.training.kept_checkpoints import mend_list

# By name, since they are internal to Ray: names missing in another version are ignored.
DATASETS = "DatasetsCallback"  # distributes shards of Ray Data's datasets, which we do not use
CLEANER = "PlacementGroupCleanerCallback"  # frees the workers' CPUs if the controller dies but its job continues
TellLost = Callable[[Mapping[int, Exception]], None]


class LeanTorchTrainer(TorchTrainer):
    """Starts one process less, and three less unless it trains a trial of a sweep.

    A job ends with its controller, which frees its workers' resources; a sweep continues with other trials.
    """

    def __init__(self, *arguments: Any, tell_lost: TellLost, errands: Any = None, **options: Any) -> None:
        """`errands` is a callback for the controller only: those of the `run_config` are also sent to the workers.
        `tell_lost` is told of workers that were lost while their group started, by rank; of others, callbacks are."""
        super().__init__(*arguments, **options)
        self._errands = [errands] if errands is not None else []
        self._tell_lost = tell_lost

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # only in version 2 of Ray Train
        unused = {DATASETS} if _in_sweep() else {DATASETS, CLEANER}
        return [callback for callback in made if type(callback).__name__ not in unused] + self._errands

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        """Runs Ray's controller in the job's driver, which is otherwise idle, instead of in an actor."""
        if mend_list(options["train_run_context"].run_config):
            print("the list of the run's checkpoints was damaged; resuming from what is in its folder", flush=True)
        if _in_sweep():  # where this waiting process forwards each report to the trial
            return super()._initialize_and_run_controller(**options)  # type: ignore[misc]
        ray_context: Any = runtime_context
        drivers_context: Any = _DriversContext
        ray_context._runtime_context = drivers_context(runtime_context.get_runtime_context().worker)
        controller = _controller(self._tell_lost)(**options)
        for handler in logging.getLogger("ray.train").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setFormatter(_OfAnActor())
        _beside_signals(lambda: asyncio.run(controller.run()))
        return controller.get_result()


def _controller(tell_lost: TellLost) -> Any:
    """Ray's controller, with groups that report what is lost at their start as the loss of a worker.

    Ray's raises such an error as its own, which ends the training, or, of a worker that dies before it is set up, tries
    again for ever.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2.api.exceptions import WorkerGroupError

    class Group(WorkerGroup):
        def _start_impl(self, worker_group_state_builder: Any) -> None:
            try:
                super()._start_impl(worker_group_state_builder)
            except (RayActorError, WorkerGroupStartupFailedError) as error:
                self._clear_state()  # type: ignore[no-untyped-call]  # a group that has not started is freed by Ray
                lost = {0: error.__cause__ if isinstance(error.__cause__, Exception) else error}
                tell_lost(lost)
                raise WorkerGroupError(str(lost[0]), lost) from error

    class Controller(TrainController):
        worker_group_cls = Group

    return Controller


def _beside_signals(work: Callable[[], None]) -> None:
    """Run it on a thread, so that this one can be interrupted, unlike a call into Ray."""
    ended: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised in the waiting thread)
            ended.set_exception(error)
        else:
            ended.set_result(None)

    threading.Thread(target=run, name="train controller", daemon=True).start()
    ended.result()


class _DriversContext(runtime_context.RuntimeContext):
    """The actor handle that the controller passes to workers, for requesting checkpoints; ours never do."""

    current_actor: Any = None


class _OfAnActor(logging.Formatter):
    """Prefixes the controller's lines like an actor's, so that they are only shown in full logs."""

    def format(self, record: logging.LogRecord) -> str:
        mark = f"(TrainController pid={os.getpid()}) "
        return "\n".join(mark + line for line in super().format(record).splitlines())


def _in_sweep() -> bool:
    """Whether this process is a trial started by Ray Tune."""
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    return bool(_in_tune_session())
