"""/tokenize, /detokenize and /tokenizer_info in the form of vLLM's server.

Each counts as one request against the caller's quota, without tokens.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.errors import PedroError
from pedro.gateway.auth import Principal, backend_for, require
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.quotas import admit
from pedro.gateway.schemas import DetokenizeRequest, TokenizeRequest, plain_messages
from pedro.store import INFER

router = APIRouter()
Caller = Annotated[Principal, Depends(require(INFER))]


@router.post("/tokenize")
async def tokenize(request: Request, caller: Caller) -> dict[str, Any]:
    wanted = parse(TokenizeRequest, await read_body(request))
    if (wanted.prompt is None) == (wanted.messages is None):
        raise PedroError("prompt: send either prompt or messages", param="prompt")
    if wanted.messages is not None and wanted.add_special_tokens:
        raise PedroError("add_special_tokens: the format of messages determines them", param="add_special_tokens")
    prompt = wanted.prompt if wanted.prompt is not None else plain_messages(wanted.messages or ())
    special = wanted.prompt is not None and wanted.add_special_tokens is not False
    await admit(request, caller)
    result = await backend_for(request, caller).tokenize(caller.view, wanted.model, prompt, special)
    return {
        "count": len(result.ids),
        "max_model_len": result.max_model_len,
        "tokens": list(result.ids),
        "token_strs": list(result.token_strs) if wanted.return_token_strs and result.token_strs is not None else None,
    }


@router.post("/detokenize")
async def detokenize(request: Request, caller: Caller) -> dict[str, str]:
    wanted = parse(DetokenizeRequest, await read_body(request))
    await admit(request, caller)
    return {"prompt": await backend_for(request, caller).detokenize(caller.view, wanted.model, tuple(wanted.tokens))}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, caller: Caller) -> dict[str, Any]:
    await admit(request, caller)
    return await backend_for(request, caller).tokenizer_info()
