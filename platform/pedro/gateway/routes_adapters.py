"""/v1/adapters for operators: versions, promote and roll back, and where an adapter is resident."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.errors import PedroError
from pedro.gateway.auth import Principal, require
from pedro.gateway.backend import AdapterCard, AdapterResidence, Backend
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.schemas import PromoteRequest
from pedro.store import ADMIN

log = logging.getLogger("pedro.gateway")
router = APIRouter(prefix="/v1/adapters")
Admin = Annotated[Principal, Depends(require(ADMIN))]


@router.get("")
async def list_adapters(request: Request, caller: Admin) -> dict[str, Any]:
    backend: Backend = request.app.state.backend()
    cards, held = await backend.list_adapters(caller.view), await _residents(backend, caller.view)
    return {"object": "list", "data": [{**_adapter(card), "residence": _residence(held, card.name)} for card in cards]}


@router.get("/{name}")
async def get_adapter(request: Request, name: str, caller: Admin) -> dict[str, Any]:
    backend: Backend = request.app.state.backend()
    card = await backend.get_adapter(caller.view, name)
    return {**_adapter(card), "residence": _residence(await _residents(backend, caller.view), name)}


@router.post("/{name}/promote")
async def promote(request: Request, name: str, caller: Admin) -> dict[str, Any]:
    wanted = parse(PromoteRequest, await read_body(request))
    card = await request.app.state.backend().promote(caller.view, name, wanted.version)
    return _adapter(card)


@router.post("/{name}/rollback")
async def rollback(request: Request, name: str, caller: Admin) -> dict[str, Any]:
    card = await request.app.state.backend().rollback(caller.view, name)
    return _adapter(card)


@router.post("/{ref}/load")
async def load(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """`ref`, as in a request's `model`: the version that it means now becomes resident on every replica."""
    return _held(ref, await request.app.state.backend().load_adapter(caller.view, ref))


@router.post("/{ref}/pin")
async def pin(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """Loads it, and keeps it from being evicted."""
    return _held(ref, await request.app.state.backend().pin_adapter(caller.view, ref))


@router.post("/{ref}/unpin")
async def unpin(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """Lets it be evicted again."""
    return _held(ref, await request.app.state.backend().unpin_adapter(caller.view, ref))


@router.post("/{ref}/unload")
async def unload(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """Gives its memory back; a running request keeps what it holds."""
    return _held(ref, await request.app.state.backend().unload_adapter(caller.view, ref))


def _adapter(card: AdapterCard) -> dict[str, Any]:
    body = asdict(card)
    for version in body["versions"]:  # JSON has no NaN or infinity
        version["metrics"] = {k: v if math.isfinite(v) else None for k, v in version["metrics"].items()}
    return {"object": "adapter", **body}


async def _residents(backend: Backend, tenant: str) -> list[AdapterResidence] | None:
    """None while the engine does not answer: versions and aliases can be seen and moved without it."""
    try:
        return await backend.residents(tenant)
    except PedroError as error:
        log.warning("where adapters are resident is not known: %s", error)
        return None


def _residence(held: list[AdapterResidence] | None, name: str) -> list[dict[str, Any]] | None:
    return None if held is None else [_residence_body(entry) for entry in held if entry.name == name]


def _held(ref: str, held: list[AdapterResidence]) -> dict[str, Any]:
    return {"object": "adapter.residence", "model": ref, "residence": [_residence_body(entry) for entry in held]}


def _residence_body(entry: AdapterResidence) -> dict[str, Any]:
    body = asdict(entry)
    del body["name"]
    return body
