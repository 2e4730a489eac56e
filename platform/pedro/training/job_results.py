"""Results of a job over HTTP besides its adapter: its metrics as a file, and its last events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pedro.errors import NotFoundError, PedroError
from pedro.files import Files
from pedro.files.names import RESULTS
from pedro.store import CHECKPOINT, NewEvent, Store
from pedro.training.job_events import checkpoint_metrics, step_metrics

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import JobRecord

MOST_POINTS = 100_000


def store_results(settings: Settings, job_id: str, log: Callable[[str], None]) -> list[str]:
    """The ids of the job's result files: an earlier driver's, or else a new one. Failures are only logged, since the
    adapter exists."""
    store = Store(settings.database_url)
    try:
        job = store.get_job(job_id)
        return [_metrics_file(store, settings, job, job.key_id)] if job.key_id else []
    except NotFoundError:  # a job without a row
        return []
    except PedroError as error:
        log(f"the job's result file could not be stored: {error.message}")
        return []
    finally:
        store.close()


def last_events(result: Mapping[str, Any]) -> list[NewEvent]:
    """The last events of a successful job. The checkpoint event is of the best one, which became the model."""
    best = checkpoint_metrics(result.get("metrics") or {})
    kept = {"model": result["model"], "step": best["step"], "metrics": best}
    return [
        NewEvent(f"Checkpoint created at step {best['step']:,}", kind=CHECKPOINT, data=kept),
        NewEvent(f"New fine-tuned model created: {result['model']}"),
        NewEvent("The job has successfully completed"),
    ]


def _metrics_file(store: Store, settings: Settings, job: JobRecord, key_id: str) -> str:
    name = f"{job.id}_metrics.csv"
    for record in store.list_files(job.tenant, purpose=RESULTS, filename=name, limit=1):
        return record.id
    points = store.list_job_events(job.id, ("metrics",), limit=MOST_POINTS)
    files = Files(store, settings.storage)
    upload = files.begin(job.tenant)
    try:
        upload.write(step_metrics(event.data or {} for event in reversed(points)).encode())
        return files.finish(upload, name, RESULTS, key_id=key_id, actor=f"job:{job.id}").id
    finally:
        upload.abandon()
