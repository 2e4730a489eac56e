"""/v1/adapters: versions, promote and roll back, for operators. Knows nothing of the registry behind them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.gateway.auth import Principal, require
from pedro.gateway.backend import AdapterCard
from pedro.gateway.body import read_body
from pedro.gateway.schemas import PromoteRequest, parse
from pedro.store import ADMIN

router = APIRouter(prefix="/v1/adapters")
Admin = Annotated[Principal, Depends(require(ADMIN))]


@router.get("")
async def list_adapters(request: Request, caller: Admin) -> dict[str, Any]:
    cards = await request.app.state.backend().list_adapters(caller.view)
    return {"object": "list", "data": [_adapter(card) for card in cards]}


@router.post("/{name}/promote")
async def promote(request: Request, name: str, caller: Admin) -> dict[str, Any]:
    wanted = parse(PromoteRequest, await read_body(request))
    card = await request.app.state.backend().promote(caller.view, name, wanted.version)
    return _adapter(card)


@router.post("/{name}/rollback")
async def rollback(request: Request, name: str, caller: Admin) -> dict[str, Any]:
    card = await request.app.state.backend().rollback(caller.view, name)
    return _adapter(card)


def _adapter(card: AdapterCard) -> dict[str, Any]:
    body = asdict(card)
    for version in body["versions"]:  # JSON has no NaN or infinity
        version["metrics"] = {k: v if math.isfinite(v) else None for k, v in version["metrics"].items()}
    return {"object": "adapter", **body}
