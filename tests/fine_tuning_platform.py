"""A gateway with a controller whose drivers do what a test says. Requests are made by the tests."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway_backend import BACKBONE
from gateway_server import serve

from pedro.config import Settings
from pedro.gateway.app import GatewaySettings
from pedro.store import JobRecord, JobStatus
from pedro.training.job_events import metrics_event
from pedro.training.job_record import OwnRecord
from pedro.training.job_results import store_results
from pedro.training.queue.controller import Controller
from pedro.training.queue.launcher import ClusterView
from pedro.training.queue.prepare import prepare

if TYPE_CHECKING:
    import openai
    from gateway_server import Gateway

ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}).encode()
    + b"\n"
    for n in range(20)
)


class Drivers:
    """A cluster whose drivers do what the test says; specs and files are looked at as on any."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.states: dict[str, JobStatus] = {}

    def prepare(self, job: JobRecord) -> dict[str, Any] | None:
        return prepare(job, self.settings)

    def look(self) -> ClusterView:
        return ClusterView(dict(self.states), [{"CPU": 4.0}], {}, {name: {"CPU": 4.0} for name in self.states})

    def start(self, _job: JobRecord, submission_id: str) -> None:
        self.states[submission_id] = JobStatus.RUNNING

    def stop(self, submission_id: str) -> None:
        self.states[submission_id] = JobStatus.CANCELLED


class Platform:
    """A gateway, and a controller that works when it is told to."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self.gateway, self.store, self.settings = gateway, gateway.store, settings
        self.drivers = Drivers(settings)
        self.controller = Controller(self.store, self.drivers)

    def rounds(self) -> None:
        """Until all files were looked at and what can start has started."""
        for _ in range(3):
            self.controller.round()
            for looking in list(self.controller._looking.values()):
                looking.result(60)

    def succeed(self, job_id: str) -> None:
        """What a driver does."""
        self.store.update_job(job_id, status=JobStatus.RUNNING, attempt=1)
        points = ((1, {"train/loss": 2.5, "train/token_accuracy": 0.5}), (2, {"train/loss": 1.5}))
        for step, values in (*points, (2, {"dev/loss": 1.25, "dev/token_accuracy": 0.75})):
            told = metrics_event(step, values)
            assert told is not None
            self.store.add_job_event(job_id, told.message, kind="metrics", data=told.data)
        model = f"{self.store.get_job(job_id).name}:1"
        metrics = {"best_step": 2, "validation_loss": 1.25, "train_tokens": 640}
        metrics |= {"train_loss": 1.5, "train_token_accuracy": 0.5, "validation_token_accuracy": 0.75}
        for _ in range(2):  # the first was lost before its end was entered
            files = store_results(self.settings, job_id, print)
        for _ in range(2):
            own = OwnRecord(self.settings.database_url, job_id, print, 1)
            own.succeeded({"model": model, "metrics": metrics, "result_files": files})
        self.drivers.states[job_id] = JobStatus.SUCCEEDED


@contextmanager
def running_platform(home: Path) -> Iterator[Platform]:
    """One in a home of its own, whose gateway serves one backbone."""
    settings = Settings.from_env({"PEDRO_HOME": str(home)})
    gateway_settings = GatewaySettings(backbones={BACKBONE: "stories260K"}, storage=settings.storage)
    with serve(home, settings=gateway_settings) as gateway:
        made = Platform(gateway, settings)
        yield made
        made.controller.close()


def upload(client: openai.OpenAI, content: bytes = ROWS, purpose: Any = "fine-tune") -> str:
    return client.files.create(file=("train.jsonl", io.BytesIO(content)), purpose=purpose).id
