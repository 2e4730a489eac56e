"""/v1/webhook_endpoints: where a tenant's events are sent, in the form of OpenAI's client.

Reference: `client.webhooks` of https://github.com/openai/openai-python
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.errors import ScopeError, UnavailableError
from pedro.gateway.auth import Principal, actor_of, counted
from pedro.gateway.pages import known_parameters, page, page_limit
from pedro.gateway.parsing import parse, read_body
from pedro.gateway.webhook_addresses import read_url
from pedro.gateway.webhook_fields import (
    RotateRequest,
    WebhookRequest,
    WebhookTest,
    WebhookUpdate,
    check_event_types,
    check_webhook_name,
)
from pedro.gateway.webhook_runner import WebhookRunner
from pedro.gateway.webhook_sending import sample
from pedro.gateway.webhook_signing import hint
from pedro.store import EVENT_TYPES, READ, TRAIN, Store, WebhookEndpoint

router = APIRouter(prefix="/v1")
Owner = Annotated[Principal, Depends(counted(TRAIN))]
Reader = Annotated[Principal, Depends(counted(READ, TRAIN))]
KEEP_S = 24 * 3600.0  # an old secret after rotation, if requested


@router.get("/webhook_event_types")
async def list_event_types(_: Reader) -> dict[str, Any]:
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/webhook_endpoints")
async def create_webhook(request: Request, caller: Owner) -> dict[str, Any]:
    runner = _runner(request, caller)
    asked = parse(WebhookRequest, await read_body(request))
    name, event_types, url = check_webhook_name(asked.name), check_event_types(asked.event_types), read_url(asked.url)
    await runner.sender.addresses.of(caller.tenant, url)
    new = runner.sender.secrets.new_endpoint
    endpoint, secret = await asyncio.to_thread(new, caller.tenant, name, str(url), event_types, runner.clock())
    await asyncio.to_thread(_store(request).create_webhook, endpoint, actor=actor_of(request, caller))
    return {**_body(endpoint), "signing_secret": secret}


@router.get("/webhook_endpoints")
async def list_webhooks(request: Request, caller: Reader) -> dict[str, Any]:
    _runner(request, caller)
    given = known_parameters(request.query_params.multi_items(), ("after", "limit"))
    limit, after = page_limit(given.get("limit")), given.get("after")
    found = await asyncio.to_thread(_store(request).list_webhooks, caller.tenant, after=after, limit=limit + 1)
    return page(found, limit, _body)


@router.get("/webhook_endpoints/{endpoint_id}")
async def get_webhook(request: Request, endpoint_id: str, caller: Reader) -> dict[str, Any]:
    _runner(request, caller)
    return _body(await asyncio.to_thread(_store(request).get_webhook, endpoint_id, caller.tenant))


@router.post("/webhook_endpoints/{endpoint_id}")
async def update_webhook(request: Request, endpoint_id: str, caller: Owner) -> dict[str, Any]:
    runner = _runner(request, caller)
    asked = parse(WebhookUpdate, await read_body(request))
    await asyncio.to_thread(_store(request).get_webhook, endpoint_id, caller.tenant)  # before resolving a host
    url = None
    if asked.url is not None:
        url = read_url(asked.url)
        await runner.sender.addresses.of(caller.tenant, url)
    changed = await asyncio.to_thread(
        _store(request).update_webhook,
        endpoint_id,
        caller.tenant,
        runner.clock(),
        name=None if asked.name is None else check_webhook_name(asked.name),
        url=None if url is None else str(url),
        event_types=None if asked.event_types is None else check_event_types(asked.event_types),
        actor=actor_of(request, caller),
    )
    return _body(changed)


@router.delete("/webhook_endpoints/{endpoint_id}")
async def delete_webhook(request: Request, endpoint_id: str, caller: Owner) -> dict[str, Any]:
    _runner(request, caller)
    delete, actor = _store(request).delete_webhook, actor_of(request, caller)
    await asyncio.to_thread(delete, endpoint_id, caller.tenant, actor=actor)
    return {"object": "webhook_endpoint.deleted", "id": endpoint_id, "deleted": True}


@router.post("/webhook_endpoints/{endpoint_id}/rotate_secret")
async def rotate_secret(request: Request, endpoint_id: str, caller: Owner) -> dict[str, Any]:
    runner = _runner(request, caller)
    now = runner.clock()
    asked = parse(RotateRequest, await read_body(request) or b"{}")
    source, secret = await asyncio.to_thread(runner.sender.secrets.new, endpoint_id)
    changed = await asyncio.to_thread(
        _store(request).rotate_webhook_secret,
        endpoint_id,
        caller.tenant,
        source,
        hint(secret),
        now=now,
        keep_until=now + KEEP_S if asked.keep_old_secret_active_for_24_hours else None,
        actor=actor_of(request, caller),
    )
    return {**_body(changed), "signing_secret": secret}


@router.post("/webhook_endpoints/{endpoint_id}/test")
async def send_test(request: Request, endpoint_id: str, caller: Owner) -> dict[str, Any]:
    """Sends a sample at once. Any HTTP status is a result; no answer is an error."""
    runner = _runner(request, caller)
    asked = parse(WebhookTest, await read_body(request) or b"{}")
    endpoint = await asyncio.to_thread(_store(request).get_webhook, endpoint_id, caller.tenant)
    status = await runner.sender.send(endpoint, *sample(asked.event_type, runner.clock()))
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": endpoint.id,
        "event_type": asked.event_type,
        "status_code": status,
        "success": True,
    }


def _runner(request: Request, caller: Principal) -> WebhookRunner:
    if caller.models is not None:
        raise ScopeError(
            "This API key is restricted to some adapters, but webhooks belong to the whole tenant; use another key."
        )
    runner: WebhookRunner | None = request.app.state.webhooks
    if runner is None:
        raise UnavailableError("This server has no key for webhook secrets.", code="webhook_key_file")
    return runner


def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


def _body(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "signing_secret_hint": endpoint.hint,
        "created_at": int(endpoint.created),
        "updated_at": int(endpoint.updated),
        "last_delivered_at": _moment(endpoint.last_delivered),
        "last_failed_at": _moment(endpoint.last_failed),
        "last_error": endpoint.last_error,
    }


def _moment(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
