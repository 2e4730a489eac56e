"""/v1/fine_tuning/jobs: a tenant's jobs, as OpenAI's clients make, follow and end them.

A job is a row of the store; a controller looks at its files and starts it when its turn comes. Nothing of this host can
be named: data are ids of uploaded files, backbones are those that the server has.
Reference: https://platform.openai.com/docs/api-reference/fine-tuning
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.errors import NotFoundError, PedroError
from pedro.files.names import FINE_TUNE
from pedro.gateway.auth import Principal, actor_of, counted
from pedro.gateway.fine_tuning import (
    JobRequest,
    adapter_of,
    served_backbone,
    shown_hyperparameters,
    shown_seed,
    spec_of,
)
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.schemas import MAX_METADATA
from pedro.store import READ, TRAIN, JobEvent, JobRecord, JobStatus, Store, Version
from pedro.store.jobs import job_not_found

router = APIRouter(prefix="/v1/fine_tuning/jobs")
Reader = Annotated[Principal, Depends(counted(READ, TRAIN))]
Owner = Annotated[Principal, Depends(counted(TRAIN))]
DEFAULT_LIMIT, MAX_LIMIT = 20, 100
MAX_KEY = 200
MAX_SPEC = 65_536


@router.post("")
async def create_job(request: Request, caller: Owner) -> dict[str, Any]:
    asked = parse(JobRequest, await read_body(request))
    backbones: dict[str, str] = request.app.state.settings.backbones
    parent = None if asked.model in backbones else await asyncio.to_thread(_parent, request, caller, asked.model)
    backbone = backbones[asked.model] if parent is None else served_backbone(parent, backbones)
    key = _idempotency_key(request)
    adapter = adapter_of(asked.suffix, key)
    if caller.models is not None and f"{caller.tenant}.{adapter}" not in caller.models:
        message = "suffix: this API key is held to other adapters"
        raise PedroError(message, param="suffix", code="invalid_value")
    spec = spec_of(asked, caller.tenant, adapter, backbone, parent)
    if len(json.dumps(spec)) > MAX_SPEC:  # every controller reads it, each round
        message = f"method.pedro: expected at most {MAX_SPEC:,} characters"
        raise PedroError(message, param="method.pedro", code="invalid_value")
    return await asyncio.to_thread(_create, request, caller, asked, spec, key)


@router.get("")
async def list_jobs(request: Request, caller: Reader) -> dict[str, Any]:
    after, limit, labels = _page(request, with_metadata=True)
    most = limit + 1 if caller.models is None else None  # what the key may not see is left out before the page is cut
    listed = await asyncio.to_thread(_store(request).list_jobs, caller.tenant, limit=most, after=after, labels=labels)
    found = [job for job in listed if _may_see(caller, job)]
    return _list([_job(request, job) for job in found[:limit]], len(found) > limit)


@router.get("/{job_id}")
async def get_job(request: Request, job_id: str, caller: Reader) -> dict[str, Any]:
    return _job(request, await asyncio.to_thread(_own_job, request, caller, job_id))


@router.post("/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str, caller: Owner) -> dict[str, Any]:
    return await _ask(request, caller, job_id, JobStatus.CANCELLED)


@router.post("/{job_id}/pause")
async def pause_job(request: Request, job_id: str, caller: Owner) -> dict[str, Any]:
    return await _ask(request, caller, job_id, JobStatus.PAUSED)


@router.post("/{job_id}/resume")
async def resume_job(request: Request, job_id: str, caller: Owner) -> dict[str, Any]:
    store = _store(request)
    await asyncio.to_thread(_own_job, request, caller, job_id)
    actor = actor_of(request, caller)
    resumed = await asyncio.to_thread(store.let_job_continue, job_id, [JobStatus.PAUSED], actor=actor)
    return _job(request, resumed)


@router.get("/{job_id}/events")
async def list_events(request: Request, job_id: str, caller: Reader) -> dict[str, Any]:
    return await _events(request, caller, job_id, ("message", "metrics"), "ftevent", _event)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(request: Request, job_id: str, caller: Reader) -> dict[str, Any]:
    return await _events(request, caller, job_id, ("checkpoint",), "ftckpt", _checkpoint)


def _create(
    request: Request, caller: Principal, asked: JobRequest, spec: dict[str, Any], key: str | None
) -> dict[str, Any]:
    """On a thread. Raises NotFoundError for a file that is not the tenant's, PedroError for one of another purpose."""
    store = _store(request)
    for field, file_id in (("training_file", asked.training_file), ("validation_file", asked.validation_file)):
        if file_id is None:
            continue
        try:
            record = store.get_file(file_id, caller.tenant)
        except NotFoundError:
            message = f'{field}: no file {file_id[:64]!r}; upload it with purpose "{FINE_TUNE}"'
            raise PedroError(message, param=field, code="file_not_found") from None
        if record.purpose != FINE_TUNE:
            message = f'{field}: {file_id} was uploaded for "{record.purpose}"; upload it with purpose "{FINE_TUNE}"'
            raise PedroError(message, param=field, code="invalid_file_purpose")
    job = store.ask_for_job(
        caller.tenant,
        spec["adapter"],
        spec,
        key_id=caller.key_id,
        labels=asked.metadata,
        idempotency_key=key,
        actor=actor_of(request, caller),
    )
    if not store.list_job_events(job.id, limit=1):
        store.add_job_event(job.id, f"Created fine-tuning job: {job.id}")
    return _job(request, job)


def _own_job(request: Request, caller: Principal, job_id: str) -> JobRecord:
    """Raises NotFoundError, the same for an unknown job, one of another tenant, and one of an adapter not the key's."""
    job = _store(request).get_job(job_id, caller.tenant)
    if not _may_see(caller, job):
        raise job_not_found(job_id)
    return job


def _may_see(caller: Principal, job: JobRecord) -> bool:
    return caller.models is None or job.name in caller.models


def _parent(request: Request, caller: Principal, model: str) -> Version:
    """The caller's own version that a job is to go on from; any other name is answered alike."""
    with suppress(NotFoundError):
        version = _store(request).get_own_version(model, caller.tenant, "model")
        if caller.models is None or version.name in caller.models:
            return version
    known = ", ".join(request.app.state.settings.backbones) or "none"
    message = f"model: {model[:80]!r} is none that can be fine-tuned here; this server has {known}"
    raise PedroError(message, param="model", code="model_not_found")


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY and key.isprintable()):
        message = f"Idempotency-Key: expected 1 to {MAX_KEY} printable characters"
        raise PedroError(message, param="Idempotency-Key", code="invalid_value")
    return key


async def _ask(request: Request, caller: Principal, job_id: str, wanted: JobStatus) -> dict[str, Any]:
    store = _store(request)
    job = await asyncio.to_thread(_own_job, request, caller, job_id)
    if job.status != wanted:
        job = await asyncio.to_thread(store.ask_of_job, job_id, wanted, actor=actor_of(request, caller))
    return _job(request, job)


async def _events(
    request: Request, caller: Principal, job_id: str, kinds: Sequence[str], prefix: str, shown: Any
) -> dict[str, Any]:
    store = _store(request)
    after, limit, _ = _page(request)
    before = None if after is None else after.removeprefix(f"{prefix}-")
    job = await asyncio.to_thread(_own_job, request, caller, job_id)
    found = await asyncio.to_thread(store.list_job_events, job_id, kinds, before=before, limit=limit + 1)
    return _list([shown(job, event) for event in found[:limit]], len(found) > limit)


def _page(request: Request, *, with_metadata: bool = False) -> tuple[str | None, int, dict[str, str]]:
    after, limit, labels = None, DEFAULT_LIMIT, dict[str, str]()
    for name, value in request.query_params.multi_items():
        if name == "after":
            after = value
        elif name == "limit":
            if not (value.isascii() and value.isdigit() and len(value) < 9 and 1 <= int(value) <= MAX_LIMIT):
                message = f"limit: expected 1 to {MAX_LIMIT}, got {value[:80]!r}"
                raise PedroError(message, param="limit", code="invalid_value")
            limit = int(value)
        elif with_metadata and name.startswith("metadata[") and name.endswith("]"):
            if not (name + value).isprintable() or '"' in name or len(labels) >= MAX_METADATA:
                message = f"metadata: expected at most {MAX_METADATA} keys without quotes, and printable text"
                raise PedroError(message, param="metadata", code="invalid_value")
            labels[name[len("metadata[") : -1]] = value
        else:
            message = f"Unrecognized request argument supplied: {name[:80]}"
            raise PedroError(message, param=name[:80], code="unknown_parameter")
    return after, limit, labels


def _list(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"object": "list", "data": data, "has_more": has_more, **ends}


def _job(request: Request, job: JobRecord) -> dict[str, Any]:
    result, data = job.result or {}, job.spec.get("data") or {}
    names = {backbone: name for name, backbone in request.app.state.settings.backbones.items()}
    backbone = str(job.spec.get("backbone", ""))
    validation = data.get("validation")
    hyperparameters = shown_hyperparameters(job.spec)
    kind = str(job.spec.get("objective", "supervised"))
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "model": job.spec.get("parent") or names.get(backbone, backbone.rstrip("/").rpartition("/")[2]),
        "created_at": int(job.created),
        "finished_at": int(job.finished) if job.finished else None,
        "fine_tuned_model": result.get("model"),
        "organization_id": job.tenant,
        "result_files": result.get("result_files", []),
        "status": job.status.value,
        "validation_file": validation if isinstance(validation, str) and validation.startswith("file-") else None,
        "training_file": _file_id(data.get("train")),
        "hyperparameters": hyperparameters,
        "trained_tokens": (result.get("metrics") or {}).get("train_tokens"),
        "error": _error(job),
        "seed": shown_seed(job.spec),
        "estimated_finish": None,
        "integrations": [],
        "metadata": job.labels,
        "method": {"type": kind, kind: {"hyperparameters": hyperparameters}},
    }


def _file_id(location: object) -> str:
    """What a job of the command line trains on has no id."""
    text = str(location or "")
    return text if text.startswith("file-") else ""


def _error(job: JobRecord) -> dict[str, Any] | None:
    if job.status != JobStatus.FAILED:
        return None
    told = (job.result or {}).get("error") or {}
    return {"code": told.get("code") or "job_failed", "message": job.message, "param": told.get("param")}


def _event(_job: JobRecord, event: JobEvent) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event",
        "id": f"ftevent-{event.public_id}",
        "created_at": int(event.at),
        "level": event.level,
        "message": event.message,
        "data": event.data or {},
        "type": event.kind,
    }


def _checkpoint(job: JobRecord, event: JobEvent) -> dict[str, Any]:
    data = event.data or {}
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": f"ftckpt-{event.public_id}",
        "created_at": int(event.at),
        "fine_tuned_model_checkpoint": data.get("model", ""),
        "fine_tuning_job_id": job.id,
        "metrics": data.get("metrics", {}),
        "step_number": int(data.get("step", 0)),
    }


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store
