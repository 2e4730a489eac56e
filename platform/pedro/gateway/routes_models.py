"""/v1/models: the names that the caller may use."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.gateway.auth import Principal, require
from pedro.gateway.backend import ModelCard
from pedro.store import INFER

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request, caller: Annotated[Principal, Depends(require(INFER))]) -> dict[str, Any]:
    cards = await request.app.state.backend().list_models(caller.view)
    return {"object": "list", "data": [_model(card) for card in cards]}


@router.get("/v1/models/{name:path}")  # a backbone's hub id holds a slash
async def get_model(
    request: Request, name: str, caller: Annotated[Principal, Depends(require(INFER))]
) -> dict[str, Any]:
    return _model(await request.app.state.backend().get_model(caller.view, name))


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
