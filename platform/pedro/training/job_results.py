"""What a job that came over HTTP leaves beside its adapter: the last of its events, and its metrics as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pedro.errors import NotFoundError, PedroError
from pedro.files import Files
from pedro.files.names import RESULTS
from pedro.store import Store
from pedro.store.job_events import CHECKPOINT
from pedro.training.job_events import checkpoint_metrics, step_metrics

if TYPE_CHECKING:
    from pedro.config import Settings

MOST_POINTS = 100_000


def publish_results(
    settings: Settings, job_id: str, model: str, metrics: Mapping[str, Any], log: Callable[[str], None]
) -> list[str]:
    """Tell the job's followers that it is done; the ids of its result files. What cannot be stored is told in the log:
    the adapter is there. Of its checkpoints the one is told that became the model, the best."""
    store = Store(settings.database_url)
    try:
        with suppress(NotFoundError):
            job = store.get_job(job_id)
            found = _metrics_file(store, settings, job_id, job.tenant, job.key_id) if job.key_id else []
            best = checkpoint_metrics(metrics)
            kept = {"model": model, "step": best["step"], "metrics": best}
            store.add_job_event(job_id, f"Checkpoint created at step {best['step']:,}", kind=CHECKPOINT, data=kept)
            store.add_job_event(job_id, f"New fine-tuned model created: {model}")
            store.add_job_event(job_id, "The job has successfully completed")
            return found
    except PedroError as error:
        log(f"the job's result file could not be stored: {error.message}")
    finally:
        store.close()
    return []


def _metrics_file(store: Store, settings: Settings, job_id: str, tenant: str, key_id: str) -> list[str]:
    points = store.list_job_events(job_id, ("metrics",), limit=MOST_POINTS)
    files = Files(store, settings.storage)
    upload = files.begin(tenant)
    try:
        upload.write(step_metrics(event.data or {} for event in reversed(points)).encode())
        return [files.finish(upload, f"{job_id}_metrics.csv", RESULTS, key_id=key_id, actor=f"job:{job_id}").id]
    finally:
        upload.abandon()
