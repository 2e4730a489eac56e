"""/v1/batches: requests of an uploaded file, answered within a day beside other traffic.

Reference: https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from pedro.errors import NotFoundError, PedroError, ScopeError, UnavailableError
from pedro.files.names import BATCH, MAX_EXPIRY_S, MIN_EXPIRY_S
from pedro.gateway.auth import Principal, actor_of, counted
from pedro.gateway.batch_runner import BatchRunner
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.schemas import Body, Metadata, Whole
from pedro.store import INFER, READ, BatchRecord, BatchStatus, Store, new_batch_id

router = APIRouter(prefix="/v1/batches")
Asker = Annotated[Principal, Depends(counted(INFER))]
Reader = Annotated[Principal, Depends(counted(INFER, READ))]
WINDOW_S = {"24h": 24 * 3600.0}
DEFAULT_LIMIT, MAX_LIMIT = 20, 100


class OutputExpiry(Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S), Whole]


class BatchRequest(Body):
    parts: ClassVar[dict[str, type[Body]]] = {"output_expires_after": OutputExpiry}
    input_file_id: str  # of an uploaded file of the purpose "batch"
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]  # the url of every row
    completion_window: Literal["24h"]  # rows that have no answer by then get none
    metadata: Metadata = None  # of the client's own
    output_expires_after: OutputExpiry | None = None  # when the files of answers go; 30 days if not given


@router.post("")
async def create_batch(request: Request, caller: Asker) -> dict[str, Any]:
    runner = _runner(request, caller)
    asked = parse(BatchRequest, await read_body(request))
    now = runner.clock()
    expiry = asked.output_expires_after
    batch = BatchRecord(
        id=new_batch_id(),
        tenant=caller.tenant,
        key_id=caller.key_id,
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        completion_window=asked.completion_window,
        status=BatchStatus.VALIDATING,
        created=now,
        expires=now + WINDOW_S[asked.completion_window],
        labels=asked.metadata,
        output_expiry_s=None if expiry is None else expiry.seconds,
    )
    await asyncio.to_thread(_enter, request, caller, batch)
    runner.wake()
    return _batch(batch)


@router.get("")
async def list_batches(request: Request, caller: Reader) -> dict[str, Any]:
    _runner(request, caller)
    after, limit = _page(dict(request.query_params))
    found = await asyncio.to_thread(_store(request).list_batches, caller.tenant, after=after, limit=limit + 1)
    page = found[:limit]
    return {
        "object": "list",
        "data": [_batch(batch) for batch in page],
        "has_more": len(found) > len(page),
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
    }


@router.get("/{batch_id}")
async def get_batch(request: Request, batch_id: str, caller: Reader) -> dict[str, Any]:
    _runner(request, caller)
    return _batch(await asyncio.to_thread(_store(request).get_batch, batch_id, caller.tenant))


@router.post("/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str, caller: Asker) -> dict[str, Any]:
    runner = _runner(request, caller)
    cancel, actor = _store(request).cancel_batch, actor_of(request, caller)
    batch = await asyncio.to_thread(cancel, batch_id, caller.tenant, runner.clock(), actor=actor)
    runner.wake()
    return _batch(batch)


def _enter(request: Request, caller: Principal, batch: BatchRecord) -> None:
    """On a thread. Raises PedroError for a file that is not the tenant's or has another purpose."""
    store, field = _store(request), "input_file_id"
    try:
        record = store.get_file(batch.input_file_id, batch.tenant)
    except NotFoundError:
        message = f'{field}: no file {batch.input_file_id[:64]!r}; upload it with purpose "{BATCH}"'
        raise PedroError(message, param=field, code="file_not_found") from None
    if record.purpose != BATCH:
        message = f'{field}: {record.id} was uploaded for "{record.purpose}"; upload it with purpose "{BATCH}"'
        raise PedroError(message, param=field, code="invalid_file_purpose")
    request.app.state.files.check_room(batch.tenant, 1)  # what it leaves is taken whatever its size
    store.create_batch(batch, request.app.state.settings.max_open_batches, actor=actor_of(request, caller))


def _page(given: dict[str, str]) -> tuple[str | None, int]:
    for name in sorted(given.keys() - {"after", "limit"}):
        message = f"Unrecognized request argument supplied: {name[:80]}; known: after, limit"
        raise PedroError(message, param=name[:80], code="unknown_parameter")
    limit = given.get("limit", str(DEFAULT_LIMIT))
    if not limit.isascii() or not limit.isdigit() or len(limit) > 9 or not 1 <= int(limit) <= MAX_LIMIT:
        raise PedroError(f"limit: expected 1 to {MAX_LIMIT}, got {limit[:80]!r}", param="limit", code="invalid_value")
    return given.get("after"), int(limit)


def _runner(request: Request, caller: Principal) -> BatchRunner:
    if caller.models is not None:
        raise ScopeError("This API key is held to some adapters, and batches are all of its tenant's; use another key.")
    runner: BatchRunner | None = request.app.state.batches
    if runner is None:
        raise UnavailableError("This server has no storage for files, and batches need one.", code="storage")
    return runner


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _batch(batch: BatchRecord) -> dict[str, Any]:
    moments = {
        f"{status.value}_at": int(batch.moments[status.value]) if status.value in batch.moments else None
        for status in BatchStatus
        if status is not BatchStatus.VALIDATING
    }
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": None,
        "errors": batch.errors and {"object": "list", "data": batch.errors},
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created),
        "expires_at": int(batch.expires),
        **moments,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.labels,
    }
