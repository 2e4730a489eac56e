"""/v1/completions and /v1/chat/completions: read the body, validate, admit, call the backend."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from pedro.errors import PedroError
from pedro.gateway.answer import Answer
from pedro.gateway.auth import Principal, require
from pedro.gateway.calls import chat_call, completion_calls
from pedro.gateway.edge import request_id_of
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.quotas import admit, reservation
from pedro.gateway.responses import ChatFormat, CompletionFormat
from pedro.gateway.schemas import ChatRequest, CompletionRequest, SamplingFields, StreamOptions
from pedro.store import INFER

TIMEOUT = "x-request-timeout"
router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, caller: Annotated[Principal, Depends(require(INFER))]) -> Response:
    wanted = parse(CompletionRequest, await read_body(request))
    calls = completion_calls(wanted, **_context(request, caller))
    response_format = CompletionFormat(calls[0].request_id.rpartition("-")[0], wanted.model)
    backend = request.app.state.backend()
    return Answer(backend, calls, response_format, admit(request, caller, reservation(calls)), **_delivery(wanted))


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, caller: Annotated[Principal, Depends(require(INFER))]) -> Response:
    wanted = parse(ChatRequest, await read_body(request))
    call = chat_call(wanted, **_context(request, caller))
    response_format = ChatFormat(call.request_id.rpartition("-")[0], wanted.model)
    backend = request.app.state.backend()
    return Answer(backend, [call], response_format, admit(request, caller, reservation([call])), **_delivery(wanted))


def _context(request: Request, caller: Principal) -> dict[str, Any]:
    return {
        "tenant": caller.view,
        "trace_id": request_id_of(request.scope),
        "max_choices": request.app.state.settings.max_choices,
        "timeout_s": _timeout_s(request),
    }


def _timeout_s(request: Request) -> float | None:
    """The header `x-request-timeout`, in seconds: how long the answer may take, within what the server allows."""
    given = request.headers.get(TIMEOUT)
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise PedroError(f"{TIMEOUT}: expected seconds above 0, got {given[:40]!r}", param=TIMEOUT)
    return timeout_s


def _delivery(wanted: SamplingFields) -> dict[str, Any]:
    options = wanted.stream_options
    return {"stream": bool(wanted.stream), "options": options or StreamOptions()}
