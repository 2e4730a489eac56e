"""/v1/adapters: tenants see their adapters and move aliases; operators see all, and where they are resident."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request

from pedro.errors import NotFoundError, PedroError, model_not_found
from pedro.gateway.auth import Principal, actor_of, backend_for, counted, require
from pedro.gateway.backend import AdapterCard, AdapterResidence, Backend
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.schemas import INT32, CanaryRequest, FeedbackRequest, PromoteRequest, ShadowRequest
from pedro.refs import ModelRef, tenant_of, version_name
from pedro.store import ADMIN, INFER, READ, TRAIN, AnswerCounts, Store

log = logging.getLogger("pedro.gateway")
router = APIRouter(prefix="/v1/adapters")
Admin = Annotated[Principal, Depends(require(ADMIN))]
Reader = Annotated[Principal, Depends(counted(READ, TRAIN))]
Owner = Annotated[Principal, Depends(counted(TRAIN))]
Rater = Annotated[Principal, Depends(counted(INFER, TRAIN))]
Number = Annotated[int, Path(ge=1, lt=INT32)]


@router.get("")
async def list_adapters(request: Request, caller: Reader) -> dict[str, Any]:
    backend = backend_for(request, caller)
    cards, held = await backend.list_adapters(caller.view), await _residents(backend, caller)
    return {"object": "list", "data": [{**_adapter(card), **_residence(caller, held, card.name)} for card in cards]}


@router.get("/{name}")
async def get_adapter(request: Request, name: str, caller: Reader) -> dict[str, Any]:
    backend = backend_for(request, caller)
    card = await backend.get_adapter(caller.view, name)
    return {**_adapter(card), **_residence(caller, await _residents(backend, caller), name)}


@router.post("/{name}/promote")
async def promote(request: Request, name: str, caller: Owner) -> dict[str, Any]:
    wanted = parse(PromoteRequest, await read_body(request))
    moved = backend_for(request, caller).promote(
        caller.view, name, wanted.version, expected=wanted.expected, actor=actor_of(request, caller)
    )
    return _adapter(await moved)


@router.post("/{name}/rollback")
async def rollback(request: Request, name: str, caller: Owner) -> dict[str, Any]:
    card = await backend_for(request, caller).rollback(caller.view, name, actor=actor_of(request, caller))
    return _adapter(card)


@router.post("/{name}/canary")
async def set_canary(request: Request, name: str, caller: Owner) -> dict[str, Any]:
    wanted = parse(CanaryRequest, await read_body(request))
    moved = backend_for(request, caller).set_canary(
        caller.view, name, wanted.version, wanted.weight, actor=actor_of(request, caller)
    )
    return _adapter(await moved)


@router.post("/{name}/shadow")
async def set_shadow(request: Request, name: str, caller: Owner) -> dict[str, Any]:
    wanted = parse(ShadowRequest, await read_body(request))
    moved = backend_for(request, caller).set_shadow(
        caller.view, name, wanted.version, wanted.weight, actor=actor_of(request, caller)
    )
    return _adapter(await moved)


@router.post("/{name}/feedback")
async def feedback(request: Request, name: str, caller: Rater) -> dict[str, Any]:
    """`counted` is false if the answer is neither a canary's nor of the champion beside one."""
    wanted = parse(FeedbackRequest, await read_body(request))
    version, score = _rated(wanted, name), _score(wanted)
    card = await backend_for(request, caller).get_adapter(caller.view, name)
    if version not in {each.version for each in card.versions}:
        raise model_not_found(version_name(name, version))
    store: Store = request.app.state.store
    known, _ = await asyncio.to_thread(store.add_answers, name, {version: AnswerCounts.scored(score)})
    return {"object": "adapter.feedback", "model": version_name(name, version), "score": score, "counted": known}


@router.delete("/{name}/versions/{version}")
async def delete_version(request: Request, name: str, version: Number, caller: Owner) -> dict[str, Any]:
    await backend_for(request, caller).delete_version(caller.view, name, version, actor=actor_of(request, caller))
    return {"object": "adapter.version", "id": version_name(name, version), "deleted": True}


@router.post("/{ref}/load")
async def load(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """`ref`, as in a request's `model`: the version to which it resolves now becomes resident on every replica."""
    held = await request.app.state.backend().load_adapter(caller.view, ref)
    return await _entered(request, caller, "adapter.load", ref, held)


@router.post("/{ref}/pin")
async def pin(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """Loads it and prevents its eviction."""
    held = await request.app.state.backend().pin_adapter(caller.view, ref)
    return await _entered(request, caller, "adapter.pin", ref, held)


@router.post("/{ref}/unpin")
async def unpin(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """Lets it be evicted again."""
    held = await request.app.state.backend().unpin_adapter(caller.view, ref)
    return await _entered(request, caller, "adapter.unpin", ref, held)


@router.post("/{ref}/unload")
async def unload(request: Request, ref: str, caller: Admin) -> dict[str, Any]:
    """Frees its memory; running requests keep it until they end."""
    held = await request.app.state.backend().unload_adapter(caller.view, ref)
    return await _entered(request, caller, "adapter.unload", ref, held)


def _rated(wanted: FeedbackRequest, name: str) -> int:
    """The version that answered."""
    if (wanted.version is None) == (wanted.system_fingerprint is None):
        raise PedroError("version: send the version that answered, or the answer's system_fingerprint", param="version")
    if wanted.version is not None:
        return wanted.version
    try:
        ref = ModelRef.parse(wanted.system_fingerprint or "")
    except NotFoundError:
        ref = None
    if ref is None or ref.name != name or ref.version is None:
        raise PedroError(f"system_fingerprint: is not that of an answer by {name}", param="system_fingerprint")
    return ref.version


def _score(wanted: FeedbackRequest) -> float:
    if (wanted.score is None) == (wanted.thumb is None):
        raise PedroError("score: send a score from 0 to 1, or a thumb, up or down", param="score")
    return wanted.score if wanted.score is not None else float(wanted.thumb == "up")


def _adapter(card: AdapterCard) -> dict[str, Any]:
    body = asdict(card)
    for version in body["versions"]:  # JSON has no NaN or infinity
        version["metrics"] = {k: v if math.isfinite(v) else None for k, v in version["metrics"].items()}
    return {"object": "adapter", **body}


async def _residents(backend: Backend, caller: Principal) -> list[AdapterResidence] | None:
    """None while the engine does not answer: versions and aliases can be shown and moved without it."""
    if not caller.is_admin:
        return None
    try:
        return await backend.residents(caller.view)
    except PedroError as error:
        log.warning("the residency of adapters is unknown: %s", error)
        return None


def _residence(caller: Principal, held: list[AdapterResidence] | None, name: str) -> dict[str, Any]:
    """Only operators see replicas."""
    if not caller.is_admin:
        return {}
    return {"residence": None if held is None else [_residence_body(entry) for entry in held if entry.name == name]}


async def _entered(
    request: Request, caller: Principal, action: str, ref: str, held: list[AdapterResidence]
) -> dict[str, Any]:
    """The residences, after recording the change in the audit: if that fails, the request fails."""
    store: Store = request.app.state.store
    await asyncio.to_thread(store.audit, action, tenant_of(ref), ref, actor=actor_of(request, caller))
    return {"object": "adapter.residence", "model": ref, "residence": [_residence_body(entry) for entry in held]}


def _residence_body(entry: AdapterResidence) -> dict[str, Any]:
    body = asdict(entry)
    del body["name"]
    return body
