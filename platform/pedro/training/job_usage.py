"""Adds a job's training to the usage ledger, once, however it ended: as of its last checkpoint.

A resumed run continues counting from there, so adding the same job again only adds the difference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pedro.errors import UnavailableError
from pedro.refs import tenant_of
from pedro.store import Usage
from pedro.training.job_record import insist
from pedro.training.storage import folders, join, read_text
from pedro.training.trainer import STATE

if TYPE_CHECKING:
    from pedro.config import Settings

PROGRESS = "progress.json"  # in a checkpoint (not imported from `checkpoints.py`, which needs torch)


def enter_training(settings: Settings, job_id: str, model: str, log: Callable[[str], None]) -> None:
    """`model` is `tenant.adapter`. Retries while the database does not answer, up to a limit."""
    try:
        tokens, seconds = trained_so_far(settings.storage, job_id)
    except (OSError, ValueError, UnavailableError) as error:
        log(f"the usage of {job_id} could not be read from its checkpoints: {error}")
        return
    if not tokens:
        return
    used = Usage(
        day=time.strftime("%Y-%m-%d", time.gmtime()),
        tenant=tenant_of(model),
        model=model,
        training_tokens=tokens,
        training_seconds=seconds,
    )
    insist(settings.database_url, lambda store: store.add_training(job_id, used), f"what {job_id} used", log)


def trained_so_far(storage: str, job_id: str) -> tuple[int, float]:
    """Tokens processed up to the last checkpoint, and training seconds times workers."""
    run = join(storage, "runs", job_id)
    reached = [(0, 0.0)]
    for name in folders(run):
        text = read_text(join(run, name, STATE, PROGRESS))
        if text is not None:
            progress = json.loads(text)
            reached.append((progress.get("all_tokens", 0), progress["world"] * progress["seconds"]))
    return max(reached)
