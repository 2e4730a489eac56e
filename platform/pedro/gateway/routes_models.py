"""/v1/models: the names that the caller may use."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.gateway.auth import Principal, backend_for, require
from pedro.gateway.backend import ModelCard
from pedro.store import INFER, READ, TRAIN

router = APIRouter()
Reader = Annotated[Principal, Depends(require(INFER, READ, TRAIN))]


@router.get("/v1/models")
async def list_models(request: Request, caller: Reader) -> dict[str, Any]:
    cards = await backend_for(request, caller).list_models(caller.view)
    return {"object": "list", "data": [_model(card) for card in cards]}


@router.get("/v1/models/{name:path}")  # a backbone's hub id holds a slash
async def get_model(request: Request, name: str, caller: Reader) -> dict[str, Any]:
    return _model(await backend_for(request, caller).get_model(caller.view, name))


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "root": card.backbone,
        "version": card.version,
        "digest": card.digest,
        "max_model_len": card.max_model_len,
    }
