"""/v1/batches: requests of an uploaded file, answered within a day beside other traffic.

Reference: https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from pedro.errors import ScopeError, UnavailableError
from pedro.files.names import BATCH, MAX_EXPIRY_S, MIN_EXPIRY_S
from pedro.gateway.auth import Principal, actor_of, counted
from pedro.gateway.batch_rows import Endpoint
from pedro.gateway.batch_runner import BatchRunner
from pedro.gateway.input_files import check_input_file
from pedro.gateway.pages import known_parameters, page, page_limit
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.schemas import Body, Metadata, Whole
from pedro.store import INFER, READ, BatchRecord, BatchStatus, Store, new_batch_id

router = APIRouter(prefix="/v1/batches")
Asker = Annotated[Principal, Depends(counted(INFER))]
Reader = Annotated[Principal, Depends(counted(INFER, READ))]
WINDOW_S = {"24h": 24 * 3600.0}


class OutputExpiry(Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S), Whole]


class BatchRequest(Body):
    parts: ClassVar[dict[str, type[Body]]] = {"output_expires_after": OutputExpiry}
    input_file_id: str  # of an uploaded file of the purpose "batch"
    endpoint: Endpoint  # the url of every row
    completion_window: Literal["24h"]  # rows unanswered by then expire
    metadata: Metadata = None  # the client's own
    output_expires_after: OutputExpiry | None = None  # when the output files expire; default 30 days


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
    given = known_parameters(request.query_params.multi_items(), ("after", "limit"))
    limit = page_limit(given.get("limit"))
    found = await asyncio.to_thread(
        _store(request).list_batches, caller.tenant, after=given.get("after"), limit=limit + 1
    )
    return page(found, limit, _batch)


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
    """On a thread. Raises PedroError if the file is not the tenant's or has another purpose."""
    store = _store(request)
    check_input_file(store, batch.tenant, "input_file_id", batch.input_file_id, BATCH)
    request.app.state.files.check_room(batch.tenant, 1)  # its output is stored whatever its size
    store.create_batch(batch, request.app.state.settings.max_open_batches, actor=actor_of(request, caller))


def _runner(request: Request, caller: Principal) -> BatchRunner:
    if caller.models is not None:
        raise ScopeError(
            "This API key is restricted to some adapters, but batches belong to the whole tenant; use another key."
        )
    runner: BatchRunner | None = request.app.state.batches
    if runner is None:
        raise UnavailableError("This server has no storage for files, which batches need.", code="storage")
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
