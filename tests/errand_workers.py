"""A driver's errands beside a worker that is in this process, as Ray Train's controller looks after one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pedro.refs import ModelRef
from pedro.training import outbox
from pedro.training.errands import Errands
from pedro.training.outbox import Outbox

if TYPE_CHECKING:
    from pedro.config import Settings


class Worker:
    """As Ray Train's controller has it; it runs what it is told at once, in this process."""

    def __init__(self) -> None:
        self.outbox = Outbox()

    def execute_async(self, call: Callable[..., Any], *arguments: Any) -> SimpleNamespace:
        done: Future[Any] = Future()
        own: dict[Any, Callable[..., Any]] = {outbox.take: self.outbox.take, outbox.answer: self.outbox.answer}
        done.set_result(own[call](*arguments))
        return SimpleNamespace(future=lambda: done)


def started(settings: Settings, worker: Any, run_id: str = "run", job_id: str = "ftjob-1") -> Errands:
    """Those of the job that trains acme.colours, as its driver has just begun."""
    errands = Errands(settings, ModelRef("acme", "colours"), run_id, job_id)
    errands.after_worker_group_start(SimpleNamespace(get_workers=lambda: [worker]))
    return errands


def ended(errands: Errands) -> None:
    """The job has ended, and all is done."""
    errands.before_worker_group_shutdown(None)
    asyncio.run(errands.before_controller_shutdown())
