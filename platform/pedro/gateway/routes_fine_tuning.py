"""/v1/fine_tuning/jobs: a tenant's jobs, created, followed and ended by OpenAI's clients.

A job is a row of the store; a controller validates its files and starts it when its turn comes. Requests cannot refer
to the host's files: data are ids of uploaded files, backbones are those of the server. Reference:
https://platform.openai.com/docs/api-reference/fine-tuning
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.errors import NotFoundError, PedroError
from pedro.files.names import FINE_TUNE
from pedro.gateway.auth import Principal, actor_of, counted
from pedro.gateway.dry_runs import DryRuns
from pedro.gateway.edge import note
from pedro.gateway.fine_tuning import (
    MAX_SPEC,
    JobRequest,
    adapter_of,
    served_backbone,
    shown_hyperparameters,
    shown_seed,
    spec_of,
)
from pedro.gateway.input_files import check_input_file
from pedro.gateway.pages import known_parameters, page, page_limit, wrong_value
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.schemas import MAX_METADATA
from pedro.gateway.sweep_requests import shown_sweep
from pedro.refs import ModelRef
from pedro.store import READ, TRAIN, Idempotency, JobEvent, JobRecord, JobStatus, Store, Version
from pedro.store.jobs import job_not_found

router = APIRouter(prefix="/v1/fine_tuning/jobs")
Reader = Annotated[Principal, Depends(counted(READ, TRAIN))]
Owner = Annotated[Principal, Depends(counted(TRAIN))]
PAGED = ("after", "limit")
MAX_KEY = 200


@router.post("")
async def create_job(request: Request, caller: Owner) -> dict[str, Any]:
    dry_run = _asks_for_dry_run(request)
    asked = parse(JobRequest, await read_body(request))
    sent = Idempotency(_idempotency_key(request), _digest(asked))
    if not dry_run:
        earlier = await asyncio.to_thread(_store(request).job_asked_before, caller.tenant, sent)
        if earlier is not None and _may_see(caller, earlier):  # even if its model's name resolves differently by now
            return _job(request, earlier)
    backbones: dict[str, str] = request.app.state.settings.backbones
    parent = None if asked.model in backbones else await asyncio.to_thread(_parent, request, caller, asked.model)
    backbone = backbones[asked.model] if parent is None else served_backbone(parent, backbones)
    adapter = adapter_of(asked.suffix, sent.key)
    if caller.models is not None and ModelRef(caller.tenant, adapter).name not in caller.models:
        message = "suffix: this API key is restricted to other adapters"
        raise PedroError(message, param="suffix", code="invalid_value")
    spec = spec_of(asked, caller.tenant, adapter, backbone, parent)
    if len(json.dumps(spec)) > MAX_SPEC:
        message = f"method.pedro: expected at most {MAX_SPEC:,} characters"
        raise PedroError(message, param="method.pedro", code="invalid_value")
    await asyncio.to_thread(_check_files, request, caller, asked)
    if dry_run:
        dry_runs: DryRuns = request.app.state.dry_runs
        return {"object": "fine_tuning.job.dry_run", "model": asked.model, **await dry_runs.ask(caller.tenant, spec)}
    created = await asyncio.to_thread(_create, request, caller, asked, spec, sent)
    note(request.scope, job=created["id"])
    return created


@router.get("")
async def list_jobs(request: Request, caller: Reader) -> dict[str, Any]:
    pairs = request.query_params.multi_items()
    labels = _labels([(name, value) for name, value in pairs if _is_label(name)])
    given = known_parameters([pair for pair in pairs if not _is_label(pair[0])], (*PAGED, "metadata[…]"))
    limit, after = page_limit(given.get("limit")), given.get("after")
    most = limit + 1 if caller.models is None else None  # filtered by the key's adapters before paging
    listed = await asyncio.to_thread(_store(request).list_jobs, caller.tenant, limit=most, after=after, labels=labels)
    found = [job for job in listed if _may_see(caller, job)]
    return page(found, limit, lambda job: _job(request, job))


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


def _asks_for_dry_run(request: Request) -> bool:
    """Our extension `?dry_run=true`."""
    given = known_parameters(request.query_params.multi_items(), ("dry_run",)).get("dry_run", "false")
    if given not in ("true", "false"):
        raise wrong_value("dry_run", "expected true or false", given)
    return given == "true"


def _check_files(request: Request, caller: Principal, asked: JobRequest) -> None:
    """On a thread. Raises PedroError if a file is not the tenant's, or has another purpose."""
    for field, file_id in (("training_file", asked.training_file), ("validation_file", asked.validation_file)):
        if file_id is not None:
            check_input_file(_store(request), caller.tenant, field, file_id, FINE_TUNE)


def _create(
    request: Request, caller: Principal, asked: JobRequest, spec: dict[str, Any], sent: Idempotency
) -> dict[str, Any]:
    """On a thread. Raises PedroError if the model was deleted meanwhile, RateLimitError if the tenant has too many
    jobs."""
    try:
        job = _store(request).ask_for_job(
            caller.tenant,
            spec["adapter"],
            spec,
            key_id=caller.key_id,
            labels=asked.metadata,
            idempotency=sent,
            most_open=request.app.state.settings.max_open_jobs,
            actor=actor_of(request, caller),
        )
    except NotFoundError:
        raise _no_model(request, asked.model) from None
    return _job(request, job)


def _own_job(request: Request, caller: Principal, job_id: str) -> JobRecord:
    """Raises NotFoundError, the same for an unknown job, another tenant's, and one of an adapter not allowed to the
    key."""
    job = _store(request).get_job(job_id, caller.tenant)
    if not _may_see(caller, job):
        raise job_not_found(job_id)
    return job


def _may_see(caller: Principal, job: JobRecord) -> bool:
    return caller.models is None or job.name in caller.models


def _parent(request: Request, caller: Principal, model: str) -> Version:
    """The caller's version from which a job continues; all other names get the same error."""
    with suppress(NotFoundError):
        version = _store(request).get_own_version(model, caller.tenant, "model")
        if caller.models is None or version.name in caller.models:
            return version
    raise _no_model(request, model)


def _no_model(request: Request, model: str) -> PedroError:
    known = ", ".join(request.app.state.settings.backbones) or "none"
    message = f"model: {model[:80]!r} cannot be fine-tuned here; this server has {known}"
    return PedroError(message, param="model", code="model_not_found")


def _digest(asked: JobRequest) -> str:
    """A digest of the request as received, before its names are resolved."""
    return hashlib.sha256(json.dumps(asked.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


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
    given = known_parameters(request.query_params.multi_items(), PAGED)
    limit, after = page_limit(given.get("limit")), given.get("after")
    before = None if after is None else after.removeprefix(f"{prefix}-")
    job = await asyncio.to_thread(_own_job, request, caller, job_id)
    found = await asyncio.to_thread(store.list_job_events, job_id, kinds, before=before, limit=limit + 1)
    return page(found, limit, lambda event: shown(job, event))


def _is_label(name: str) -> bool:
    return name.startswith("metadata[") and name.endswith("]")


def _labels(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Raises PedroError for too many entries, or text that databases cannot store."""
    if len(given) > MAX_METADATA or not all((name + value).isprintable() for name, value in given):
        message = f"metadata: expected at most {MAX_METADATA} keys, and printable text"
        raise PedroError(message, param="metadata", code="invalid_value")
    return {name.removeprefix("metadata[").removesuffix("]"): value for name, value in given}


def _job(request: Request, job: JobRecord) -> dict[str, Any]:
    result, data = job.result or {}, job.spec.get("data") or {}
    names = {backbone: name for name, backbone in request.app.state.settings.backbones.items()}
    backbone = str(job.spec.get("backbone", ""))
    validation = data.get("validation")
    hyperparameters = shown_hyperparameters(job.spec)
    kind = str(job.spec.get("objective", "supervised"))
    sweep = shown_sweep(job.spec)
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
        "estimated_finish": _estimated_finish(job),
        "integrations": [],
        "metadata": job.labels,
        "method": {
            "type": kind,
            kind: {"hyperparameters": hyperparameters},
            **({} if sweep is None else {"pedro": {"sweep": sweep}}),
        },
    }


def _estimated_finish(job: JobRecord) -> int | None:
    return int(job.estimated_finish) if job.status == JobStatus.RUNNING and job.estimated_finish else None


def _file_id(location: object) -> str:
    """Data of jobs from the command line have no id."""
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
