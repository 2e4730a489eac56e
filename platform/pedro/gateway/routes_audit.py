"""/v1/organization/audit_logs: who changed what, in OpenAI's shape. Operators see everything, a tenant its own rows.

Reference: https://platform.openai.com/docs/api-reference/audit-logs
"""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from pedro.errors import PedroError, ScopeError
from pedro.gateway.auth import Principal, counted
from pedro.gateway.pages import page
from pedro.store import PLATFORM, READ, AuditEntry, AuditQuery

router = APIRouter()
TYPES = {  # OpenAI's names where it has them; otherwise ours
    "key.create": "api_key.created",
    "key.rotate": "api_key.updated",
    "key.revoke": "api_key.deleted",
    "quota.set": "rate_limit.updated",
}
ACTIONS = {name: action for action, name in TYPES.items()}
LISTS = ("project_ids", "event_types", "actor_ids", "resource_ids")
MOMENTS = ("gt", "gte", "lt", "lte")
UNSUPPORTED = ("before", "actor_emails", "tenant_only")
DEFAULT_LIMIT, MAX_LIMIT, MAX_LISTED, BIGGEST = 20, 100, 100, 2**53
CURSOR = re.compile(r"audit_log-[0-9a-f]{24}")
OPERATOR: dict[str, Any] = {"type": "session", "session": {"user": {"id": "operator"}}}


@router.get("/v1/organization/audit_logs")
async def list_audit_logs(request: Request, caller: Annotated[Principal, Depends(counted(READ))]) -> dict[str, Any]:
    if caller.models is not None:
        raise ScopeError(
            "This API key is restricted to some adapters, but the audit covers the whole tenant; use another key."
        )
    given = _parameters(request)
    limit = _whole("limit", given.pop("limit", [str(DEFAULT_LIMIT)])[0], 1, MAX_LIMIT)
    query = _query(given, caller)
    found: list[AuditEntry] = []
    if query is not None:
        found = await asyncio.to_thread(request.app.state.store.find_audit, query, limit + 1)
    return page(found, limit, lambda entry: _log(entry, caller))


def _parameters(request: Request) -> dict[str, list[str]]:
    """The query by name, without the brackets of lists. Raises PedroError for an unknown name."""
    given: dict[str, list[str]] = {}
    known = {"limit", "after", *LISTS, *(f"effective_at[{word}]" for word in MOMENTS)}
    for key, value in request.query_params.multi_items():
        name = key.removesuffix("[]")
        if name in UNSUPPORTED:
            raise PedroError(f"{name}: not supported", param=name, code="unsupported_parameter")
        if name not in known:
            message = f"Unrecognized request argument supplied: {name[:80]}"
            raise PedroError(message, param=name[:80], code="unknown_parameter")
        if not value.isprintable():
            raise PedroError(f"{name}: expected plain text, got {value[:80]!r}", param=name, code="invalid_value")
        values = given.setdefault(name, [])
        values.append(value)
        if len(values) > (MAX_LISTED if name in LISTS else 1):
            raise PedroError(f"{name}: given too often", param=name, code="invalid_value")
    return given


def _query(given: dict[str, list[str]], caller: Principal) -> AuditQuery | None:
    """The filter; None if it matches only other tenants' rows."""
    lists = {name: tuple(given.get(name, ())) for name in LISTS}
    tenants, actors = lists["project_ids"], lists["actor_ids"]
    others_alone = bool(tenants) and caller.tenant not in tenants
    if not caller.is_admin:
        tenants = (caller.tenant,)
        actors = tuple(f"key:{caller.tenant}/{actor}" for actor in actors)
    since, until = [0], [BIGGEST]
    before: str | None = None
    for word in MOMENTS:  # times are in whole seconds
        for text in given.get(f"effective_at[{word}]", ()):
            moment = _whole(f"effective_at[{word}]", text, 0, BIGGEST - 1)
            (since if word.startswith("g") else until).append(moment + (word in ("gt", "lte")))
    for text in given.get("after", ()):
        if not CURSOR.fullmatch(text):
            message = f"after: expected the id of an audit log, got {text[:80]!r}"
            raise PedroError(message, param="after", code="invalid_value")
        before = text
    if others_alone and not caller.is_admin:
        return None
    return AuditQuery(
        tenants,
        tuple(ACTIONS.get(name, name) for name in lists["event_types"]),
        actors,
        lists["resource_ids"],
        since=max(since),
        until=min(until),
        before=before,
    )


def _whole(name: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 18 and least <= int(text) <= most):
        message = f"{name}: expected a whole number from {least} to {most}, got {text[:80]!r}"
        raise PedroError(message, param=name, code="invalid_value")
    return int(text)


def _log(entry: AuditEntry, caller: Principal) -> dict[str, Any]:
    kind = TYPES.get(entry.action, entry.action)
    body: dict[str, Any] = {
        "object": "organization.audit_log",
        "id": entry.public_id,
        "type": kind,
        "effective_at": int(entry.at),
        "actor": _actor(entry, caller),
        kind: {"id": entry.subject, "before": entry.before, "after": entry.after},
    }
    if entry.tenant != PLATFORM:
        body["project"] = {"id": entry.tenant, "name": entry.tenant}
    if caller.is_admin:
        body["request_id"] = entry.request_id
    return body


def _actor(entry: AuditEntry, caller: Principal) -> dict[str, Any]:
    """Tenants see actors other than their own keys as the operator."""
    kind, _, name = entry.actor.partition(":")
    tenant, _, key_id = name.partition("/")
    if not caller.is_admin and (kind, tenant) != ("key", caller.tenant):
        return OPERATOR
    if kind == "key":
        key = {"id": key_id, "type": "service_account", "service_account": {"id": tenant}}
        return {"type": "api_key", "api_key": key}
    return {"type": "session", "session": {"user": {"id": entry.actor}}}
