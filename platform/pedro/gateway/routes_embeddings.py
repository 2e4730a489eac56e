"""/v1/embeddings: each input is a backend call that generates no token.

Reference: https://platform.openai.com/docs/api-reference/embeddings/create
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from pedro.errors import PedroError
from pedro.gateway.auth import Principal, backend_for, require
from pedro.gateway.backend import GenerateCall
from pedro.gateway.embeddings import EmbeddingsAnswer, EmbeddingsRequest
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.quotas import admit, reservation
from pedro.gateway.routes_inference import call_context
from pedro.store import INFER

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(request: Request, caller: Annotated[Principal, Depends(require(INFER))]) -> Response:
    wanted = parse(EmbeddingsRequest, await read_body(request))
    calls = embedding_calls(wanted, **call_context(request, caller))
    backend = backend_for(request, caller)
    ticket = await admit(request, caller, reservation(calls))
    entry = request.app.state.usage.entry(caller.tenant, caller.key_id, wanted.model)
    return EmbeddingsAnswer(backend, calls, wanted, ticket, entry)


def embedding_calls(
    request: EmbeddingsRequest, *, tenant: str, trace_id: str, max_choices: int, timeout_s: float | None = None
) -> tuple[GenerateCall, ...]:
    """One call per input, in order. Raises PedroError if there are too many."""
    if len(request.input) > max_choices:
        raise PedroError(f"input: expected at most {max_choices} items, got {len(request.input)}", param="input")
    stem = uuid.uuid4().hex
    params: dict[str, Any] = {"max_tokens": 0, "pooling": request.pooling or "last"}
    return tuple(
        GenerateCall(
            request_id=f"embd-{stem}-{number}",
            tenant=tenant,
            model=request.model,
            prompt=prompt,
            params=params,
            timeout_s=timeout_s,
            trace_id=trace_id,
            user=request.user,
            cache_salt=request.cache_salt or "",
        )
        for number, prompt in enumerate(request.input)
    )
