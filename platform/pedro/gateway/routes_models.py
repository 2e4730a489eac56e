"""/v1/models: the names that the caller may use; its own versions without an alias can be deleted."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.errors import ConflictError, NotFoundError, PedroError, model_not_found
from pedro.gateway.auth import Principal, actor_of, backend_for, counted, require
from pedro.gateway.backend import ModelCard
from pedro.refs import ModelRef
from pedro.store import INFER, READ, TRAIN

router = APIRouter()
Owner = Annotated[Principal, Depends(counted(TRAIN))]
Reader = Annotated[Principal, Depends(require(INFER, READ, TRAIN))]


@router.get("/v1/models")
async def list_models(request: Request, caller: Reader) -> dict[str, Any]:
    cards = await backend_for(request, caller).list_models(caller.view)
    return {"object": "list", "data": [_model(card) for card in cards]}


@router.get("/v1/models/{name:path}")  # a backbone's hub id contains a slash
async def get_model(request: Request, name: str, caller: Reader) -> dict[str, Any]:
    return _model(await backend_for(request, caller).get_model(caller.view, name))


@router.delete("/v1/models/{name:path}")
async def delete_model(request: Request, name: str, caller: Owner) -> dict[str, Any]:
    backend = backend_for(request, caller)
    try:
        ref = ModelRef.parse(name)
    except NotFoundError:
        ref = None
    if ref is None or ref.version is None:
        card = await backend.get_model(caller.view, name)
        if ref is None:
            raise ConflictError(f"'{name}' is the backbone, which cannot be deleted", param="model")
        assert card.version is not None, "the name of an adapter resolves to a version"
        now = ref.at(card.version)
        raise ConflictError(f"'{name}' currently means '{now}'; name the version to delete", param="model")
    if ref.digest:
        raise PedroError(f"model: expected '{ref.without_digest}', without a digest", param="model")
    try:
        await backend.delete_version(caller.view, ref.name, ref.version, unused=True, actor=actor_of(request, caller))
    except NotFoundError:
        raise model_not_found(name) from None
    return {"id": name, "object": "model", "deleted": True}


def _model(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": card.owned_by,
        "root": card.backbone,
        "parent": None if card.version is None else card.backbone,
        "version": card.version,
        "digest": card.digest,
        "max_model_len": card.max_model_len,
    }
