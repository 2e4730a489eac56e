"""The driver's work for its workers: only the driver writes to MLflow and the database, and fetches adapters there.

Runs in the same process as Ray Train's controller, which polls the workers five times a second: in the job's driver,
for a sweep's trial in an actor on the same host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.train import Checkpoint
from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback

from pedro.errors import AdapterError, NotFoundError, PedroError, UnavailableError
from pedro.registry import CHAMPION, Registry
from pedro.training import outbox, waiting_checkpoints
from pedro.training.background import Background
from pedro.training.checkpoint_versions import publish
from pedro.training.curves import log_point
from pedro.training.handed_adapters import HandedAdapter, hand
from pedro.training.storage import join
from pedro.training.trainer import unpack_settings
from pedro.training.waiting_checkpoints import ADAPTER

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.refs import ModelRef
    from pedro.training.waiting_checkpoints import WaitingCheckpoint

LOOK_S, CURVES_S, ANSWERS_S, MODELS_S = 5.0, 60.0, 5.0, 600.0
"""Time limit for the last poll of the outbox and the remaining work. No worker waits by then."""


class Errands(WorkerGroupCallback, ReportCallback, ControllerCallback):
    """The errands of one run. Failures are logged or sent as answers; training continues."""

    def __init__(self, settings: Settings, model: ModelRef, run_id: str, job_id: str) -> None:
        """`model` is the adapter being trained."""
        self._settings, self._model, self._run_id, self._job_id = settings, model, run_id, job_id
        self._registry = Registry.open(settings)
        # separate threads: neither a slow tracking server nor publishing a checkpoint delays an answer
        self._curves = Background("a point of the curves is lost")
        self._answers = Background("an answer to a worker is lost")
        self._models = Background("a checkpoint was not saved as a model")
        self._underway: set[int] = set()
        """Questions of the current worker being answered: it may repeat them meanwhile."""
        self._worker: Any = None
        self._run = join(settings.storage, "runs", job_id)
        self._began = False
        self._left = False  # a checkpoint could not be published
        self._looked = threading.Event()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled for the controller of a trial, without passwords."""
        return _again, (self._settings.env(), self._model, self._run_id, self._job_id)

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._worker, self._underway = worker_group.get_workers()[0], set()
        if not self._began:
            self._began = True
            self.take_up()
        self._looked.set()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if self._looked.is_set():  # one poll at a time
            self._look()

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Handle the workers' last messages; lost workers have none."""
        if self._looked.wait(LOOK_S):
            self._look()
            self._looked.wait(LOOK_S)

    async def before_controller_shutdown(self) -> None:
        self.close()

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """A checkpoint is kept by now. Its adapter is copied at once, since the checkpoint goes when newer ones come,
        and to where the next driver finds it if this one is killed."""
        made = metrics[0].get(outbox.MODEL)
        if made is None or training_report.checkpoint is None:
            return
        kept = training_report.checkpoint
        self.publish_from(Checkpoint(f"{kept.path}/{ADAPTER}", kept.filesystem).to_directory, made)

    def publish_from(self, copy_to: Callable[[Any], object], made: Mapping[str, Any]) -> None:
        """Copy a checkpoint's adapter with `copy_to`, which takes a directory, and start registering it as a
        version."""
        try:
            kept = waiting_checkpoints.keep(self._run, copy_to, made)
        except Exception as error:  # noqa: BLE001 - whatever the storage raises, or a full disk
            _say_no_model(made, error)
        else:
            self._models.do(partial(self._publish, kept))

    def take_up(self) -> None:
        """Begin to make versions of what a driver before this one was killed with."""
        self._models.do(self._publish_waiting)

    def _publish_left(self) -> None:
        if self._left:
            self._publish_waiting()

    def _publish_waiting(self) -> None:
        for kept in waiting_checkpoints.waiting(self._run):
            self._publish(kept)

    def _publish(self, kept: WaitingCheckpoint) -> None:
        try:
            with kept.here() as directory:
                publish(self._registry, self._model, self._job_id, self._run_id, directory, kept.made)
        except Exception as error:  # noqa: BLE001 - whatever the tracking server's client raises
            _say_no_model(kept.made, error)
            if not isinstance(error, AdapterError):  # what is away may be back at this driver's end, or for the next
                self._left = True
                return
        kept.remove()

    def _look(self) -> None:
        self._looked.clear()
        looking = self._worker.execute_async(outbox.take).future()
        looking.add_done_callback(partial(self._found, self._worker))

    def _found(self, worker: Any, looking: Future[list[outbox.CurvePoint | outbox.WorkerQuestion]]) -> None:
        with suppress(Exception):  # a lost worker, which Ray Train notices by itself
            for item in looking.result():
                self.do(item, partial(worker.execute_async, outbox.answer))
        self._looked.set()

    def do(self, item: outbox.CurvePoint | outbox.WorkerQuestion, reply: Callable[[int, Any], object]) -> None:
        """Start handling a worker's message; `reply` takes a question's number and the answer."""
        if isinstance(item, outbox.CurvePoint):
            self._curves.do(partial(self._log, item))
        elif item.number not in self._underway:
            self._underway.add(item.number)
            self._answers.do(partial(self._answer, reply, item))

    def close(self) -> None:
        """Finish the remaining work."""
        self._curves.close(CURVES_S)
        self._answers.close(ANSWERS_S)
        self._models.do(self._publish_left)
        self._models.close(MODELS_S)

    def _log(self, point: outbox.CurvePoint) -> None:
        log_point(self._registry, self._run_id, self._job_id, point.step, point.values)

    def _answer(self, reply: Callable[[int, Any], object], question: outbox.WorkerQuestion) -> None:
        try:
            answer: Any = {outbox.THE_CHAMPION: self._champion}[question.about]()
        except PedroError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - the waiting worker must get any error
            answer = UnavailableError(
                f"the registry did not return the {question.about} ({type(error).__name__}: {error})"
            )
        self._underway.discard(question.number)
        reply(question.number, answer)

    def _champion(self) -> HandedAdapter | None:
        """The current champion; None if there is none; without files if they are unavailable."""
        try:
            version = self._registry.get(self._model.name, CHAMPION)
        except NotFoundError:
            return None
        try:
            return hand(version, self._registry, self._settings, self._job_id)
        except PedroError as error:
            return HandedAdapter(version.ref, version.version, problem=error.message)


def _again(settings: Mapping[str, str], model: ModelRef, run_id: str, job_id: str) -> Errands:
    return Errands(unpack_settings(settings), model, run_id, job_id)


def _say_no_model(made: Mapping[str, Any], error: Exception) -> None:
    print(f"the checkpoint of step {made['step']:,} was not saved as a model: {error}", flush=True)
