"""/v1/responses: translates a request into a chat, and its answer back. Stores nothing.

Reference: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from pedro.errors import PedroError
from pedro.gateway.auth import Principal, backend_for, require
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.quotas import admit, reservation
from pedro.gateway.response_answer import ResponseAnswer
from pedro.gateway.response_fields import ResponsesRequest
from pedro.gateway.response_input import Translation
from pedro.gateway.routes_inference import call_context, chat_call
from pedro.store import INFER

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request, caller: Annotated[Principal, Depends(require(INFER))]) -> Response:
    wanted = parse(ResponsesRequest, await read_body(request))
    translation = Translation(wanted)
    try:
        call = chat_call(translation.chat, **call_context(request, caller))
    except PedroError as error:
        raise translation.named(error) from None
    backend = backend_for(request, caller)
    ticket = await admit(request, caller, reservation([call]))
    entry = request.app.state.usage.entry(caller.tenant, caller.key_id, wanted.model)
    return ResponseAnswer(backend, call, wanted, translation, ticket, entry)
